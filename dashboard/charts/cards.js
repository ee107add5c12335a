// Cards of the overview: what is running, and what was saved. Rebuilt only when what they say has changed.
class Cards {
  constructor(host) {
    this.root = element("div", "zo-cards", host);
    this.root.dataset.testid = "zo-cards";
  }

  // {cards: [{title, hover, light, dark, chip: [text, why], progress: [share, text], figures: [[value, label, why, tone]], spark: [y], text}]}
  configure({ cards }, dark) {
    this.root.replaceChildren(...cards.map((card) => this.card(card, dark)));
  }

  card({ title, hover, light, dark: darkColor, chip, progress, figures, spark, text }, dark) {
    const root = element("div", "zo-card"), head = element("div", "zo-card-head", root), color = dark ? darkColor : light;
    if (color) element("span", "zo-dot", head).style.background = color;
    const name = element("span", "zo-name", head, title);
    name.title = hover;
    if (chip) {
      const made = element("span", "zo-status", head, chip[0]);
      made.dataset.status = chip[0];
      made.title = chip[1];
    }
    if (progress) {
      const line = element("div", "zo-progress", root), track = element("span", "zo-track", line);
      if (progress[0] !== null) element("span", "zo-done", track).style.width = `${(100 * progress[0]).toFixed(1)}%`;
      else track.remove();
      element("span", "zo-progress-text", line, progress[1]);
    }
    const row = element("div", "zo-figures", root);
    for (const [value, label, why, tone] of figures) {
      const figure = element("div", "zo-figure", row);
      figure.title = why;
      element("div", `zo-big zo-${tone}`, figure, value);
      element("div", "zo-small", figure, label);
    }
    if (text) element("div", "zo-card-text", root, text);
    if (spark.length > 1) root.append(sparkline(spark, color));
    return root;
  }
}

function sparkline(values, color) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.classList.add("zo-spark");
  line.setAttribute("points", values.map((v, i) => `${((100 * i) / (values.length - 1)).toFixed(2)},${(28 - (26 * (v - low)) / span).toFixed(2)}`).join(" "));
  line.setAttribute("stroke", color ?? "currentColor");
  svg.append(line);
  return svg;
}
