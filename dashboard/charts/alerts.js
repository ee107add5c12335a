// Tells of runs that end or go wrong while somebody has the page open: a count in the title until it is looked at, and a
// notification of the browser where the user asked for one.
const TOLD = { finished: "has finished", failed: "ended with an error", killed: "was killed", diverged: "has diverged" };
const BELL = "zo-notify";

class Alerts {
  constructor(host) {
    this.bell = element("button", "zo-bell", host);
    this.news = element("div", "zo-news", host);
    this.news.setAttribute("role", "status");
    this.bell.onclick = () => this.ring();
    this.unseen = 0;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.unseen = 0;
      this.entitle();
    });
    this.titles = new MutationObserver(() => this.entitle()); // Streamlit sets its own
    this.titles.observe(document.head, { subtree: true, childList: true, characterData: true });
    this.dress();
  }

  // {runs: [{id, label, status}]}
  configure({ runs }) {
    const now = new Map(runs.map((run) => [run.id, run.status]));
    const ended = this.before ? runs.filter((run) => TOLD[run.status] && this.before.has(run.id) && this.before.get(run.id) !== run.status) : [];
    this.before = now;
    if (ended.length) {
      const said = ended.map((run) => `${run.label} ${TOLD[run.status]}`).join(", ");
      this.news.textContent = said;
      if (document.hidden) this.unseen += ended.length;
      if (this.on) new Notification("zolightning", { body: said.slice(0, 300), tag: "zolightning" });
    }
    this.entitle();
  }

  entitle() {
    const plain = document.title.replace(/^\(\d+\) /, "");
    const wanted = this.unseen ? `(${this.unseen}) ${plain}` : plain;
    if (document.title !== wanted) document.title = wanted;
  }

  get on() {
    return globalThis.Notification?.permission === "granted" && localStorage.getItem(BELL) === "1";
  }

  async ring() {
    if (this.on) localStorage.removeItem(BELL);
    else if (!globalThis.Notification) this.news.textContent = "This browser has no notifications.";
    else if ((await Notification.requestPermission()) === "granted") localStorage.setItem(BELL, "1");
    else this.news.textContent = "The browser does not allow notifications of this page.";
    this.dress();
  }

  dress() {
    this.bell.setAttribute("aria-pressed", String(this.on));
    this.bell.textContent = this.on ? "🔔 Notifies of ends and failures" : "🔕 Notify me of ends and failures";
  }
}
