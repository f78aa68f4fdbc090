"""The mathematics: grids, solvers, rounding, histograms; nothing of Caffe."""
