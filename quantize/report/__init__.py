"""The report a person looks at: one HTML file made from report.json and the caffemodels."""
