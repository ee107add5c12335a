"""The charts of the pages: live line charts on uPlot, and still ones on ECharts."""
