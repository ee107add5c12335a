// The charts of one page: their lines' styles, and the zoom and the hidden lines that they share.
class Board {
  constructor(name) {
    this.name = name;
    this.styles = new Map();
    this.hidden = new Set();
    this.zoom = null;
    this.charts = new Set();
    this.legends = new Set();
    this.parts = new Map(); // chart id -> part name -> part, for charts that are mounted after their data came
    this.bytes = {};
    this.theme(document.body);
  }

  // {series: [{id, label, title, light, dark, dash}], zoom, hidden}: the last two count only at first sight.
  configure({ series, zoom, hidden }) {
    if (!this.configured) {
      this.zoom = zoom;
      this.hidden = new Set(hidden);
    }
    const before = this.configured ? this.styles : new Map(series.map((s) => [s.id, s]));
    this.configured = true;
    this.styles = new Map(series.map((s) => [s.id, s]));
    this.show(before);
    this.refresh(); // plots ask for their colours at each drawing: none is made anew
  }

  theme(host) {
    const css = getComputedStyle(host);
    const read = (name, fallback) => css.getPropertyValue(name).trim() || fallback;
    this.paper = read("--st-background-color", "#ffffff");
    this.ink = read("--st-text-color", "#31333f");
    this.accent = read("--st-primary-color", "#4b6bfb");
    this.dark = isDark(this.paper);
    this.faint = this.dark ? "rgba(255,255,255,0.09)" : "rgba(0,0,0,0.07)";
  }

  style(id) {
    return this.styles.get(id) ?? { label: id, light: "#888888", dark: "#999999", dash: [] };
  }

  // All but the line that the user points at are faint.
  color(id, alpha = 1) {
    const hex = this.style(id)[this.dark ? "dark" : "light"];
    if (this.lit && this.lit !== id) alpha *= 0.15;
    return alpha === 1 ? hex : hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
  }

  // Names "id\nrole" in the order of the legend, faint lines first so that they lie below.
  ordered(names) {
    const roles = ["low", "high", "raw", "line"], ids = [...this.styles.keys()];
    const known = names.map((n) => n.split("\n")).filter(([id]) => this.styles.has(id));
    const rank = new Map(ids.map((id, i) => [id, i]));
    known.sort(([a, p], [b, q]) => roles.indexOf(p) - roles.indexOf(q) || rank.get(a) - rank.get(b));
    return known.map((n) => n.join("\n"));
  }

  feed(header, bytes) {
    for (const [id, { x, lines, marks, counts, note }] of Object.entries(header.charts)) {
      const part = {
        x: header.array(x),
        lines: lines.map(([line, role, y, index, first]) => ({ id: line, role, y: header.array(y), index: index && header.array(index), first })),
        marks: marks.map(([line, kind, places, n]) => ({ id: line, kind, x: places, n })),
        counts: counts.map(([line, end, n]) => ({ id: line, x: end, n })),
        note,
      };
      // the points of everything stay beside those of a zoom, for the moment after the zoom is left
      const name = `${header.part} ${header.zoom ? "near" : "all"}`;
      if (!this.parts.has(id)) this.parts.set(id, new Map());
      this.parts.get(id).set(name, part);
      for (const chart of this.charts) if (chart.options.id === id) chart.feed(name, part);
    }
    this.bytes[header.part] = bytes;
  }

  refresh() {
    for (const chart of this.charts) chart.refresh();
    for (const legend of this.legends) legend.refresh();
  }

  setZoom(range) {
    this.zoom = range;
    if (!range) for (const parts of [...this.parts.values(), ...[...this.charts].map((chart) => chart.parts)]) for (const name of parts.keys()) if (name.endsWith("near")) parts.delete(name);
    for (const chart of this.charts) chart.dirty = true;
    this.refresh();
    this.tell();
  }

  toggle(id, alone) {
    const others = [...this.styles.keys()].filter((other) => other !== id);
    const isAlone = others.every((other) => this.hidden.has(other)) && !this.hidden.has(id);
    if (alone) this.hidden = new Set(isAlone ? [] : others);
    else if (!this.hidden.delete(id)) this.hidden.add(id);
    this.refresh();
    this.tell();
  }

  // Point at a line, by its own id or that of one of its runs; null: at none.
  light(id) {
    const lit = id && (this.styles.has(id) ? id : [...this.styles].find(([, style]) => style.runs?.includes(id))?.[0]);
    if ((lit ?? null) === (this.lit ?? null)) return;
    this.lit = lit ?? null;
    for (const chart of this.charts) chart.recolor();
    for (const legend of this.legends) legend.refresh();
  }

  // A line that has just been selected is there to be seen, and so is the only one.
  show(before) {
    const ids = [...this.styles.keys()], all = ids.every((id) => this.hidden.has(id));
    const shown = ids.filter((id) => this.hidden.has(id) && (all || !before.has(id)));
    for (const id of shown) this.hidden.delete(id);
    if (shown.length) this.tell();
  }

  // The server keeps the zoom and the hidden lines in the page's address, and sends finer points for the range.
  tell() {
    clearTimeout(this.telling);
    this.untold = !this.send;
    this.telling = setTimeout(() => this.send?.("seen", { zoom: this.zoom, hidden: [...this.hidden] }), 150);
  }
}

class Legend {
  constructor(host, board) {
    this.board = board;
    this.root = element("div", "zo-legend", host);
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", "Lines");
    this.root.dataset.testid = "zo-legend";
    board.legends.add(this);
  }

  // A chip for each line; kept while the lines are the same, so that a double click finds its chip again.
  refresh() {
    const { board } = this, ids = [...board.styles.keys()].join("\n");
    if (this.ids !== ids) this.root.replaceChildren(...[...board.styles.keys()].map((id) => this.chip(id)));
    this.ids = ids;
    for (const chip of this.root.children) {
      const { id } = chip.dataset, style = board.style(id), color = board.color(id), [on, off] = style.dash;
      chip.title = `${style.title}\nClick: hide or show. Double click, or Shift and Enter: only this one.`;
      chip.classList.toggle("zo-lit", board.lit === id);
      chip.setAttribute("aria-pressed", String(!board.hidden.has(id)));
      chip.firstChild.style.background = on ? `repeating-linear-gradient(90deg, ${color} 0 ${on}px, transparent 0 ${on + off}px)` : color;
      chip.lastChild.textContent = style.label;
    }
  }

  chip(id) {
    const chip = element("button", "zo-chip");
    chip.dataset.id = id;
    element("span", "zo-swatch", chip);
    element("span", "zo-name", chip);
    chip.onclick = (e) => { if (e.detail < 2) this.board.toggle(id, e.altKey || e.shiftKey); };
    chip.onmouseenter = chip.onfocus = () => light(id);
    chip.onmouseleave = chip.onblur = () => light(null);
    chip.ondblclick = () => { this.board.hidden.delete(id); this.board.toggle(id, true); };
    return chip;
  }
}

const isDark = (color) => {
  const hex = /^#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})$/i.exec(color);
  const [r, g, b] = hex ? hex.slice(1).map((part) => parseInt(part, 16)) : pixel(color);
  return 0.3 * r + 0.6 * g + 0.1 * b < 128;
};

// Red, green and blue of a colour however it is written; a first canvas takes a while.
function pixel(color) {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = color;
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
}

const boards = new Map();
const mounted = new WeakMap();
// One line on every chart, in every legend and in the list of runs.
function light(id) {
  let runs = id ? [id] : [];
  for (const one of boards.values()) {
    one.light(id);
    runs = one.lit ? [...runs, ...(one.styles.get(one.lit)?.runs ?? [])] : runs;
  }
  for (const row of document.querySelectorAll(".zo-run")) row.classList.toggle("zo-lit", runs.includes(row.dataset.id));
}

const board = (name) => boards.get(name) ?? boards.set(name, new Board(name)).get(name);

function themed(host) {
  const page = new Board("");
  page.theme(host);
  return page;
}

// What the components of charts/live.py call; `c` is Streamlit's {data, parentElement, setStateValue}.
globalThis.zo ??= {
  legend(c) {
    const page = board(c.data.board);
    page.theme(c.parentElement);
    if (!mounted.has(c.parentElement)) mounted.set(c.parentElement, new Legend(c.parentElement, page));
    page.configure(c.data);
  },

  chart(c) {
    const page = board(c.data.board);
    page.theme(c.parentElement);
    let chart = mounted.get(c.parentElement);
    if (!chart) {
      chart = early?.give(c.data, c.parentElement) ?? new Chart(c.parentElement, page);
      mounted.set(c.parentElement, chart);
      page.charts.add(chart);
    }
    const other = chart.options?.id !== c.data.id;
    chart.send = c.setStateValue;
    chart.configure(c.data);
    if (other) chart.parts = new Map(page.parts.get(c.data.id));
    chart.dirty = true;
    return () => {
      page.charts.delete(chart);
      chart.destroy();
      mounted.delete(c.parentElement);
    };
  },

  runs(c) {
    if (!mounted.has(c.parentElement)) mounted.set(c.parentElement, new RunList(c.parentElement));
    mounted.get(c.parentElement).configure(c.data, themed(c.parentElement).dark, c.setStateValue);
  },

  alerts(c) {
    if (!mounted.has(c.parentElement)) mounted.set(c.parentElement, new Alerts(c.parentElement));
    const alerts = mounted.get(c.parentElement);
    alerts.configure(c.data);
    return () => alerts.titles.disconnect();
  },

  cards(c) {
    if (!mounted.has(c.parentElement)) mounted.set(c.parentElement, new Cards(c.parentElement));
    mounted.get(c.parentElement).configure(c.data, themed(c.parentElement).dark);
  },

  feed(c) {
    const header = unpack(c.data), page = board(header.board);
    if (header.part === "live") page.send = c.setStateValue;
    if (page.untold) page.tell();
    page.feed(header, c.data.byteLength);
  },

  // Draw what the address shows while Streamlit starts.
  async early(css) {
    const answer = await fetch(`./zo/charts${location.search}`);
    if (answer.status === 200) early ??= new Early(unpack(new Uint8Array(await answer.arrayBuffer())), css);
  },

  // for tests: what is drawn now, and how many bytes each part of the last feed had
  charts: () => [...boards.values()].flatMap((one) => [...one.charts].map((chart) => chart.info())),
  bytes: () => [...boards.values()].at(-1).bytes,
};
dispatchEvent(new Event("zo-ready"));
export default () => {};
