// The list of runs in the sidebar: a filter, the boxes of the runs that it leaves, and each run's status. Rows are made when
// the user comes near them, and kept, so scroll and focus stay.
const TYPING = 350; // milliseconds without a key before the pages follow the filter
const ROWS = 60; // more at a time

class RunList {
  constructor(host) {
    this.root = element("div", "zo-runs", host);
    this.root.dataset.testid = "zo-runs";
    this.filter = element("input", "zo-filter", this.root);
    this.filter.type = "search";
    this.filter.placeholder = "Filter: lr<1e-3 reft -killed";
    this.filter.setAttribute("aria-label", "Filter runs");
    this.filter.setAttribute("aria-describedby", "zo-filter-help");
    this.filter.oninput = () => this.typed();
    this.trouble = element("div", "zo-trouble", this.root);
    this.trouble.setAttribute("role", "status");
    const help = element("div", "zo-help", this.root);
    help.id = "zo-filter-help";
    help.textContent = "Words of the name, method or status; /regex/; lr<1e-3, recipe=reft, optimizer~adam over parameters, metrics and tags; -term for not; a or b.";
    const bar = element("div", "zo-bar", this.root);
    this.count = element("span", "zo-count", bar);
    for (const [text, title, pick] of [
      ["all", "Select every run that the filter leaves", () => [true, []]],
      ["none", "Select no run", () => [false, []]],
      ["live", "Select only the runs that are going on", () => [false, this.runs.filter((run) => run.status === "live").map((run) => run.id)]],
    ]) {
      const button = element("button", "zo-pick", bar, text);
      button.title = title;
      button.setAttribute("aria-label", title);
      button.onclick = () => this.choose(...pick());
    }
    this.list = element("div", "zo-list", this.root);
    this.list.setAttribute("role", "group");
    this.list.setAttribute("aria-label", "Runs");
    this.rows = new Map();
    this.most = ROWS;
    this.end = element("div", "zo-end");
    new IntersectionObserver(([seen]) => {
      if (!seen.isIntersecting) return;
      this.most += ROWS;
      this.show();
    }, { root: this.list, rootMargin: "400px" }).observe(this.end);
  }

  // {key, runs: [{id, label, title, light, dark, dash, status, why}], all, ids, filter, left: [id's beginning] or null, trouble}:
  // selected are all runs but for `ids`, or `ids` only; null leaves all. The boxes and the filter are the user's: what the
  // server says of them counts only at first sight of a key, since it may not have heard of the last click.
  configure({ key, runs, all, ids, filter, left, trouble }, dark, send) {
    this.runs = runs;
    this.send = send;
    if (this.key !== key) {
      [this.all, this.ids] = [all, new Set(ids)];
      this.filter.value = filter;
      clearTimeout(this.sending);
      clearTimeout(this.telling);
    }
    this.key = key;
    if (this.filter.value === filter && !this.asking) this.narrow(left, trouble);
    this.dark = dark;
    this.rows = new Map(runs.filter((run) => this.rows.has(run.id)).map((run) => [run.id, this.rows.get(run.id)]));
    for (const run of runs) if (this.rows.has(run.id)) this.describe(run);
    this.show();
  }

  describe(run) {
    const { swatch, name, chip, only } = this.rows.get(run.id), color = this.dark ? run.dark : run.light, [on, off] = run.dash;
    name.textContent = run.label;
    name.title = run.title;
    chip.textContent = chip.dataset.status = run.status;
    chip.title = run.why;
    only.setAttribute("aria-label", `Select only ${run.label}`);
    swatch.style.background = on ? `repeating-linear-gradient(90deg, ${color} 0 ${on}px, transparent 0 ${on + off}px)` : color;
  }

  row({ id }) {
    const root = element("div", "zo-run"), label = element("label", "zo-run-label", root);
    root.dataset.id = id;
    const box = element("input", "zo-box", label);
    box.type = "checkbox";
    box.onchange = () => {
      const ids = new Set(this.ids);
      if (box.checked === this.all) ids.delete(id);
      else ids.add(id);
      this.choose(this.all, [...ids]);
    };
    const swatch = element("span", "zo-swatch", label), name = element("span", "zo-name", label);
    const only = element("button", "zo-only", root, "only");
    only.onclick = () => this.choose(false, [id]);
    root.onmouseenter = root.onfocusin = () => light(id);
    root.onmouseleave = root.onfocusout = () => light(null);
    return { root, box, swatch, name, only, chip: element("span", "zo-status", root) };
  }

  // The server says which runs a text leaves, at once; the pages follow when the user pauses.
  async typed() {
    const filter = this.filter.value;
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.send("filter", filter), TYPING);
    this.asking?.abort();
    const asking = (this.asking = new AbortController()), query = new URLSearchParams(location.search);
    query.set("filter", filter);
    try {
      const answer = await fetch(`./zo/match?${query}`, { signal: asking.signal });
      if (answer.status === 200) {
        const { ids, trouble } = await answer.json();
        this.narrow(ids, trouble);
        this.show();
        this.root.dataset.follows = filter; // for measurements
      }
    } catch {
      // typed on, or a server without this way: the page brings the runs when it follows
    }
    if (this.asking === asking) this.asking = null;
  }

  narrow(left, trouble) {
    this.trouble.textContent = trouble;
    if (!trouble) this.left = left && new Set(left.map((id) => id.slice(0, 10)));
  }

  show() {
    const there = (this.runs ?? []).filter((run) => !this.left || this.left.has(run.id.slice(0, 10)));
    const near = there.slice(0, this.most).map((run) => {
      if (!this.rows.has(run.id)) {
        this.rows.set(run.id, this.row(run));
        this.describe(run);
      }
      const { root, box } = this.rows.get(run.id);
      box.checked = this.all !== this.ids.has(run.id);
      return root;
    });
    if (near.length < there.length) near.push(this.end);
    if (near.length !== this.list.children.length || near.some((row, i) => this.list.children[i] !== row)) this.place(near);
    const shown = there.length.toLocaleString("en-US"), all = this.runs.length.toLocaleString("en-US");
    this.count.textContent = shown === all ? `${all} runs` : `${shown} of ${all}`;
    this.root.dataset.shown = there.length;
  }

  // The rows of the list; those that stay are not touched, so what has the focus keeps it.
  place(rows) {
    const stay = new Set(rows);
    for (const row of [...this.list.children]) if (!stay.has(row)) row.remove();
    rows.forEach((row, i) => {
      if (this.list.children[i] !== row) this.list.insertBefore(row, this.list.children[i] ?? null);
    });
  }

  choose(all, ids) {
    [this.all, this.ids] = [all, new Set(ids)];
    this.show();
    clearTimeout(this.sending);
    this.sending = setTimeout(() => this.send("selected", { all, ids }), 250);
  }
}
