// The charts of the address before Streamlit is up. They lie over the page about where it will have them, and move into its
// shells, as they are, once all of these are there.
const PATIENCE = 15_000; // milliseconds; then whatever Streamlit has to say is shown

let early = null;

class Early {
  // message: {legend, charts, feeds} of charts/pack.py's bundle
  constructor(message, css) {
    const page = board(message.legend.board);
    if (page.charts.size) return; // Streamlit was faster
    const root = element("div", "zo-early", document.body);
    element("style", "", root, css);
    root.classList.toggle("zo-dark", darkTheme());
    root.style.setProperty("--zo-sidebar", innerWidth > 768 ? `${localStorage.getItem("sidebarWidth") ?? 300}px` : "0px");
    const head = element("div", "zo-early-side", root, "zolightning");
    element("div", "zo-early-wait", head, "the controls are coming …");
    page.theme(root);
    const legend = new Legend(root, page), grid = element("div", "zo-early-charts", root);
    grid.style.gridTemplateColumns = `repeat(${message.charts.length > 1 ? 2 : 1}, minmax(0, 1fr))`;
    page.configure(message.legend);
    for (const ref of message.feeds) page.feed(unpack(message.array(ref)), ref[2]);
    this.waiting = new Map(message.charts.map((options) => {
      const chart = new Chart(grid, page);
      chart.parts = new Map(page.parts.get(options.id));
      chart.configure(options);
      page.charts.add(chart);
      return [options.id, chart];
    }));
    this.hosts = new Map();
    this.end = () => {
      clearTimeout(this.timer);
      for (const [id, host] of this.hosts) host.append(this.waiting.get(id).root);
      for (const [id, chart] of this.waiting) if (!this.hosts.has(id)) { page.charts.delete(chart); chart.destroy(); }
      page.legends.delete(legend);
      root.remove();
      this.waiting = new Map();
    };
    this.timer = setTimeout(this.end, PATIENCE);
  }

  // The chart for a shell, if there is one; it moves there when it is no longer needed here.
  give({ id }, host) {
    const chart = this.waiting?.get(id);
    if (!chart || this.hosts.has(id)) return null;
    this.hosts.set(id, host);
    if (this.hosts.size === this.waiting.size) this.end();
    return chart;
  }
}

// What the user chose in Streamlit's menu, else what the system says.
function darkTheme() {
  const key = Object.keys(localStorage).find((one) => one.startsWith(`stActiveTheme-${location.pathname}-v`));
  const chosen = /(dark|light)"/i.exec(key ? localStorage.getItem(key) : "");
  return chosen ? chosen[1].toLowerCase() === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
