// One live chart. Data, zoom and hidden lines are set from outside; new data never remounts it.
const ROLE = { raw: { width: 1, alpha: 0.28 }, line: { width: 1.6, alpha: 1 }, low: { width: 0, alpha: 1 }, high: { width: 0, alpha: 1 } };
const MARKS = {
  nan: { edge: "top", text: "not a number" },
  inf: { edge: "top", text: "+ infinity" },
  "-inf": { edge: "bottom", text: "− infinity" },
  dropped: { edge: "bottom", text: "≤ 0, not on a log axis" },
};
const PARTS = ["settled", "live"];
const TIP_ROWS = 10;
const NEAR = 16; // pixels from the pointer to the line that it means
const FAR = 4; // times the highest value: a level beyond is named at the edge, lest it flatten the lines
const MANY_POINTS = 6000; // beyond, lines are one pixel wide and not dashed: twenty times faster without a graphics card

class Chart {
  constructor(host, board) {
    this.board = board;
    this.parts = new Map();
    this.mounts = 0;
    this.root = element("div", "zo-chart", host);
    this.root.dataset.testid = "zo-chart";
    const head = element("div", "zo-head", this.root);
    this.title = element("div", "zo-title", head);
    this.note = element("div", "zo-note", head);
    this.back = element("button", "zo-tool zo-back", head, "Reset zoom");
    this.save = element("button", "zo-tool zo-save", head, "PNG");
    this.back.onclick = () => board.setZoom(null);
    this.save.onclick = () => savePicture(this);
    this.save.title = "Save this chart as a picture";
    this.plot = element("div", "zo-plot", this.root);
    this.empty = element("div", "zo-empty", this.plot);
    chartKeys(this);
    this.tip = element("div", "zo-tip", this.root);
    this.tip.hidden = true;
    this.resizer = new ResizeObserver(() => this.fit());
    this.resizer.observe(this.plot);
  }

  // options: {id, title, x: {label, kind}, unit, log, height, rules: [{y, label, drag}], empty}
  configure(options) {
    const remake = !this.options || this.options.log !== options.log || this.options.x.kind !== options.x.kind;
    this.options = options;
    this.root.dataset.key = options.id;
    this.name();
    this.title.title = options.why || options.title;
    this.title.classList.toggle("zo-explained", !!options.why);
    this.plot.setAttribute("aria-label", `${this.title.textContent} over ${options.x.label}. ${KEYS_HELP}`);
    this.plot.style.height = `${options.height}px`;
    if (remake) this.signature = null;
    this.refresh();
  }

  name() {
    const { title } = this.options, unit = this.scale?.unit ?? this.options.unit;
    this.title.textContent = unit ? `${title} (${unit})` : title;
  }

  feed(name, part) {
    this.parts.set(name, part);
    this.dirty = true;
    this.refresh();
  }

  refresh() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    if (!this.options) return;
    const began = performance.now();
    const fed = PARTS.map((p) => (this.board.zoom && this.parts.get(`${p} near`)) || this.parts.get(`${p} all`) || this.parts.get(`${p} near`)).filter(Boolean);
    if (fed.length < PARTS.length) return; // the other part is on its way
    const parts = fed.filter((p) => p.x.length);
    this.marks = fed.flatMap((p) => p.marks).filter((m) => this.board.styles.has(m.id));
    this.note.textContent = this.note.title = fed.map((p) => p.note).find(Boolean) ?? "";
    this.back.classList.toggle("zo-on", !!this.board.zoom);
    this.empty.textContent = parts.length ? "" : this.options.empty;
    this.counts = fed.flatMap((p) => p.counts).filter((one) => this.board.styles.has(one.id));
    if (this.dirty || !this.aligned) {
      this.aligned = align(parts.length ? parts : [{ x: new Float64Array(0), lines: [] }]);
      this.scale = scaled(this.aligned.columns, this.options.unit);
      this.name();
    }
    this.dirty = false;
    const names = this.board.ordered([...this.aligned.columns.keys()]);
    const signature = names.join("\0");
    const data = [this.aligned.x, ...names.map((n) => this.aligned.columns.get(n))];
    if (this.signature !== signature) this.make(names, data);
    else {
      this.dress();
      this.u.setData(data);
    }
    this.signature = signature;
    this.ms = performance.now() - began;
    this.root.dataset.points = this.aligned.points;
  }

  make(names, data) {
    this.u?.destroy();
    this.mounts += 1;
    this.names = names.map((n) => n.split("\n"));
    const { board } = this;
    const series = this.names.map(([id, role]) => ({
      stroke: () => (role === "low" || role === "high" ? "transparent" : board.color(id)),
      alpha: ROLE[role].alpha,
      ...this.clothes(id, role),
      points: { show: (u, i) => role !== "low" && role !== "high" && sparse(u, i), size: 5, fill: () => board.color(id), stroke: () => board.color(id) },
    }));
    const bands = this.names.flatMap(([id, role], i) => {
      const low = this.names.findIndex(([other, r]) => other === id && r === "low");
      return role === "high" && low >= 0 ? [{ series: [i + 1, low + 1], fill: () => board.color(id, 0.18) }] : [];
    });
    const ink = () => board.ink, faint = () => board.faint;
    const axis = { stroke: ink, font: "12px sans-serif", grid: { stroke: faint, width: 1 }, ticks: { stroke: faint, width: 1, size: 4 } };
    const time = this.options.x.kind === "time";
    this.u = new uPlot({
      width: Math.max(120, this.plot.clientWidth), height: this.options.height,
      padding: [10, 14, 0, 4],
      legend: { show: false },
      cursor: { sync: { key: board.name }, drag: { x: true, y: false, setScale: false }, points: { show: false }, bind: { dblclick: () => () => board.setZoom(null) } },
      scales: {
        x: { time: false, range: (u, low, high) => board.zoom ?? padded(low, high) },
        y: { distr: this.options.log ? 3 : 1, range: (u, low, high) => this.yRange(low, high) },
      },
      axes: [
        { ...axis, size: 34, label: this.options.x.label, labelSize: 16, labelGap: -4, labelFont: "12px sans-serif", ...(time ? { incrs: TIME_STEPS } : {}), values: (u, v) => v.map((one) => (time ? duration(one) : tickLabel(one, gap(v)))) },
        { ...axis, size: (u, labels) => 14 + 7 * Math.max(3, ...(labels ?? []).map((l) => (l ?? "").length)), values: (u, v) => this.yLabels(v), ...(this.options.log ? { splits: (u, i, low, high) => decades(low, high), filter: (u, v) => v } : {}) },
      ],
      series: [{}, ...series],
      bands,
      hooks: {
        draw: [() => drawMarks(this), () => drawCounts(this), () => drawRules(this)],
        setCursor: [() => this.point()],
        setSelect: [(u) => this.selected(u)],
      },
    }, data, this.plot);
    ruleDragging(this);
  }

  yRange(low, high) {
    const { factor } = this.scale, near = (r) => r.drag || high === null || r.y * factor <= FAR * high;
    const levels = this.options.rules.filter(near).map((r) => r.y * factor).filter((y) => Number.isFinite(y));
    if (low === null && !levels.length) return this.options.log ? [0.1, 10] : [0, 1];
    const [least, most] = [Math.min(low ?? Infinity, ...levels), Math.max(high ?? -Infinity, ...levels)];
    if (this.options.log) return wholeDecades(least, most);
    return uPlot.rangeNum(this.options.zero ? Math.min(0, least) : least, most, { min: { pad: 0.06, soft: 0, mode: 3 }, max: { pad: 0.06, soft: 0, mode: 3 } });
  }

  yLabels(values) {
    this.labels = values.map((v) => tickLabel(v, this.options.log ? v : gap(values)));
    return this.labels;
  }

  // What may change between two drawings without a new plot.
  clothes(id, role) {
    const many = this.aligned.points > MANY_POINTS, { width } = ROLE[role];
    const thick = this.board.lit === id && role === "line" ? 0.8 : 0;
    return { show: !this.board.hidden.has(id), width: (many ? Math.min(1, width) : width) + thick, dash: many || role !== "line" ? [] : this.board.style(id).dash };
  }

  dress() {
    this.names.forEach(([id, role], i) => Object.assign(this.u.series[i + 1], this.clothes(id, role)));
  }

  // Draw the same lines in the colours that hold now.
  recolor() {
    this.coloring ??= requestAnimationFrame(() => {
      this.coloring = null;
      if (!this.u) return;
      this.dress();
      this.u.redraw(false);
    });
  }

  fit() {
    if (this.u && this.plot.clientWidth > 0 && this.plot.clientWidth !== this.u.width)
      this.u.setSize({ width: this.plot.clientWidth, height: this.options.height });
  }

  selected(u) {
    if (u.select.width < 4) return;
    // short numbers: they go into the page's address
    const range = [u.select.left, u.select.left + u.select.width].map((at) => Number(u.posToVal(at, "x").toPrecision(7)));
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (range[1] > range[0]) this.board.setZoom(range);
  }

  // The values beside the cursor, nearest line first.
  point() {
    const { left, top, idx } = this.u.cursor;
    const here = this.u.over.matches(":hover") || this.plot === document.activeElement; // other charts follow with their crosshair alone
    const rows = !here || idx == null || left < 0 ? [] : readings(this, idx, top);
    this.tip.hidden = !rows.length;
    const pointed = rows.length && Math.abs(rows[0].far) < NEAR ? rows[0].id : null;
    if (here || this.pointed) light(pointed);
    this.pointed = pointed;
    if (!rows.length) return;
    this.tip.replaceChildren();
    const x = this.aligned.x[idx];
    element("div", "zo-tip-x", this.tip, this.options.x.kind === "time" ? duration(x) : `${this.options.x.label} ${this.note.textContent ? "about " : ""}${reading(x)}`);
    for (const { id, text } of rows.slice(0, TIP_ROWS)) {
      const row = element("div", id === pointed ? "zo-tip-row zo-lit" : "zo-tip-row", this.tip);
      element("span", "zo-dot", row).style.background = this.board.color(id);
      element("span", "zo-name", row, this.board.style(id).label);
      element("span", "zo-value", row, text);
    }
    if (rows.length > TIP_ROWS) element("div", "zo-tip-more", this.tip, `and ${rows.length - TIP_ROWS} more`);
    const right = left > this.u.over.clientWidth / 2;
    const at = this.u.over.offsetLeft + left + (right ? -12 - this.tip.offsetWidth : 12);
    this.tip.style.transform = `translate(${Math.max(0, at)}px, ${this.plot.offsetTop + 8}px)`;
  }

  // What tests ask for.
  info() {
    if (!this.u) return { id: this.options.id, points: 0, mounts: 0 };
    const { x, y } = this.u.scales;
    const drawn = this.names.map((n) => [n.join(" "), this.aligned.columns.get(n.join("\n")).filter((v) => v != null)]);
    const lines = Object.fromEntries(drawn.map(([name, y]) => [name, y.length])), newest = Object.fromEntries(drawn.map(([name, y]) => [name, y.length ? y.at(-1) / this.scale.factor : undefined]));
    return { id: this.options.id, range: [x.min, x.max], y: [y.min, y.max], labels: this.labels, last: this.aligned.x.at(-1), points: this.aligned.points, lines, newest, marks: this.marks, counts: this.counts, unit: this.scale.unit, mounts: this.mounts, ms: this.ms };
  }

  destroy() {
    this.resizer.disconnect();
    this.u?.destroy();
    this.root.remove();
  }
}

// The decades around the values, one at least.
function wholeDecades(least, most) {
  if (!(least > 0)) return [0.1, 10];
  const low = Math.floor(Math.log10(least) + 1e-6), high = Math.ceil(Math.log10(most) - 1e-6);
  return [10 ** low, 10 ** Math.max(high, low + 1)];
}

// Where a logarithmic axis has lines: at each decade, or at every second, third, … where there are many; at 2 and 5 too where
// there are few.
function decades(low, high) {
  const [from, to] = [Math.ceil(Math.log10(low) - 1e-6), Math.floor(Math.log10(high) + 1e-6)], every = Math.ceil((to - from + 1) / 8);
  const found = [];
  for (let power = from; power <= to; power += every)
    for (const part of to - from <= 2 ? [1, 2, 5] : [1]) if (part * 10 ** power <= high * 1.000001) found.push(Number(`${part}e${power}`));
  return found;
}

const gap = (values) => (values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0]) || 1);
const padded = (low, high) => (low === null ? [0, 1] : low === high ? [low - 0.5, high + 0.5] : [low, high + 0.01 * (high - low)]);

// Few enough points on the screen to show each as a dot.
function sparse(u, i) {
  const [from, to] = u.series[0].idxs, column = u.data[i], most = u.bbox.width / devicePixelRatio / 14;
  let n = 0;
  for (let k = from; k <= to && n <= most; k++) if (column[k] != null) n += 1;
  return n <= most;
}

// For each visible run: its point nearest to the cursor's x, sorted by distance from the cursor's y.
function readings(chart, idx, top) {
  const { u, names, aligned, board } = chart, x = aligned.x, at = x[idx];
  const reach = (u.scales.x.max - u.scales.x.min) / 40;
  const rows = [];
  names.forEach(([id, role], i) => {
    if (role !== "line" || board.hidden.has(id)) return;
    const column = u.data[i + 1];
    let near = null;
    for (let d = 0; near === null && (idx - d >= 0 || idx + d < x.length); d++) {
      const [a, b] = [idx - d, idx + d];
      if (column[a] != null) near = a;
      else if (column[b] != null) near = b;
      else if ((a < 0 || at - x[a] > reach) && (b >= x.length || x[b] - at > reach)) break;
    }
    if (near === null || Math.abs(x[near] - at) > reach) return;
    const low = u.data[1 + names.findIndex(([o, r]) => o === id && r === "low")], band = names.some(([o, r]) => o === id && r === "low");
    const said = (v) => reading(chart.scale.power ? v / chart.scale.factor : v), count = chart.counts.find((one) => one.id === id && one.x >= x[near]);
    const text = said(column[near]) + (band && low[near] != null ? ` ± ${said(column[near] - low[near])}` : "") + (count ? `, n=${count.n}` : "");
    rows.push({ id, text, far: Math.abs(u.valToPos(column[near], "y") - top) });
  });
  for (const { id, kind, x: places, n } of chart.marks) {
    const near = places.map((_, k) => k).filter((k) => Math.abs(u.valToPos(places[k], "x") - u.cursor.left) < 6);
    if (board.hidden.has(id) || !near.length) continue;
    const count = near.reduce((sum, k) => sum + n[k], 0), [from, to] = [places[near[0]], places[near.at(-1)]].map(reading);
    rows.push({ id, text: `${MARKS[kind].text}${count > 1 ? ` × ${count}` : ""}, ${from === to ? from : `${from} to ${to}`}`, far: -1 });
  }
  return rows.sort((a, b) => a.far - b.far);
}
