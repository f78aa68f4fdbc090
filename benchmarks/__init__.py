"""Programs that measure time and memory and print a table; see docs/performance.md."""
