// What the pointer does on a chart, from the keyboard: arrows read values, + and − zoom, Shift and arrows move, 0 shows all.
const KEYS_HELP = "Arrows read values, plus and minus zoom, Shift and arrows move, 0 shows everything.";

function chartKeys(chart) {
  const { plot, board } = chart;
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "chart");
  plot.onkeydown = (e) => {
    if (!chart.u || e.ctrlKey || e.metaKey || e.altKey) return;
    const { min, max } = chart.u.scales.x, width = max - min, middle = (min + max) / 2, way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    const zoom = (low, high) => { if (high > low) board.setZoom([low, high].map((at) => Number(at.toPrecision(7)))); };
    if (e.key === "+" || e.key === "=") zoom(middle - width / 4, middle + width / 4);
    else if (e.key === "-" || e.key === "_") board.zoom && zoom(middle - width, middle + width);
    else if (e.key === "0" || e.key === "Escape") board.setZoom(null);
    else if (way && e.shiftKey) zoom(min + (way * width) / 5, max + (way * width) / 5);
    else if (way) readOn(chart, way);
    else return;
    e.preventDefault();
  };
  plot.onblur = () => chart.u?.setCursor({ left: -10, top: -10 });
}

// The crosshair a few pixels on, on the same height.
function readOn({ u }, way) {
  const width = u.over.clientWidth, at = u.cursor.left >= 0 ? u.cursor.left + (way * width) / 50 : width / 2;
  u.setCursor({ left: Math.max(0, Math.min(width - 1, at)), top: u.cursor.top >= 0 ? u.cursor.top : u.over.clientHeight / 2 });
}
