// Cards that are ranked by mouse or keyboard. Ranking happens here, so fast keys keep their order; only the result is sent.
// Everything shown comes as text or as a picture's bytes: nothing in it is interpreted.
const made = new WeakMap();
const element = (tag, name, text = "") => Object.assign(document.createElement(tag), { className: name, textContent: text });
const nth = (place) => `${place}${place % 10 === 1 && place !== 11 ? "st" : place % 10 === 2 && place !== 12 ? "nd" : place % 10 === 3 && place !== 13 ? "rd" : "th"}`;

class Ranking {
  constructor(root) {
    this.root = root;
    this.pressed = (event) => this.key(event);
    document.addEventListener("keydown", this.pressed);
  }

  // What is asked; the same question keeps what was ranked so far, also when the page is loaded again.
  ask(data, send) {
    this.send = send;
    if (this.id === data.id) return;
    Object.assign(this, data, { steps: this.kept(data.id), sent: false, stopping: false });
    const row = element("div", "zo-rank-cards");
    row.dataset.title = data.title;
    this.buttons = data.cards.map((card, n) => this.card(card, n, row));
    const bar = element("div", "zo-rank-bar");
    const add = (name, text, act) => {
      const button = element("button", `zo-rank-${name}`, text);
      button.type = "button";
      button.addEventListener("click", act);
      bar.append(button);
      return button;
    };
    this.equal = add("equal", "Next is equal (E)", () => this.toggleEqual());
    this.alike = add("alike", "All are equal (0)", () => this.do({ alike: true }));
    this.undo = add("undo", "Undo (U)", () => this.back());
    this.done = add("send", "", () => this.finish());
    this.stop = add("stop", "Stop", () => this.leave());
    const hint = data.blind ? "Choose the better one" : `Choose the best first; ${data.top} are enough`;
    this.status = element("p", "zo-rank-status");
    this.status.setAttribute("role", "status");
    this.root.replaceChildren(element("p", "zo-rank-hint", `${hint}. Keys: 1 to ${Math.min(9, data.cards.length)}, and Enter to send.`), row, bar, this.status);
    this.draw();
  }

  card(card, n, row) {
    const button = element("button", "zo-rank-card");
    button.type = "button";
    button.addEventListener("click", () => this.pick(n));
    const name = this.blind ? "AB"[n] : String(n + 1);
    button.append(element("span", "zo-rank-name", this.blind ? `${name} (${n + 1})` : name), element("span", "zo-rank-place"));
    if ("picture" in card) {
      const picture = element("img", "zo-rank-picture");
      picture.alt = `picture ${name}`;
      picture.addEventListener("error", () => picture.replaceWith(element("span", "zo-rank-text", "This picture is damaged.")));
      picture.src = `data:image/png;base64,${card.picture}`;
      button.append(picture);
    } else button.append(element("span", "zo-rank-text", card.text));
    row.append(button);
    return button;
  }

  // The steps so far as groups, the best first; a step is a card's number, or that all are equal.
  groups() {
    const groups = [];
    for (const step of this.steps) {
      if (step.alike) groups.splice(0, groups.length, this.cards.map((_, n) => n));
      else if (step.equal && groups.length) groups.at(-1).push(step.pick);
      else groups.push([step.pick]);
    }
    return groups;
  }

  place(n) {
    let better = 0;
    for (const group of this.groups()) {
      if (group.includes(n)) return better + 1;
      better += group.length;
    }
    return 0;
  }

  pick(n) {
    if (n < this.cards.length && !this.place(n)) this.do({ pick: n, equal: this.joining });
  }

  do(step) {
    if (this.sent || (step.alike && this.steps.at(-1)?.alike)) return;
    this.steps.push(step);
    this.settled();
  }

  back() {
    if (this.sent) return;
    if (this.joining) this.joining = false;
    else this.steps.pop();
    this.settled();
  }

  toggleEqual() {
    if (!this.sent && this.steps.length) this.joining = !this.joining;
    this.draw();
  }

  settled() {
    this.joining = false;
    this.stopping = false;
    try {
      sessionStorage.setItem(`zo-rank-${this.id}`, JSON.stringify(this.steps));
    } catch {
      // a page without storage forgets it when it is loaded again
    }
    this.draw();
  }

  kept(id) {
    try {
      return JSON.parse(sessionStorage.getItem(`zo-rank-${id}`)) ?? [];
    } catch {
      return [];
    }
  }

  finish() {
    if (this.sent || !this.steps.length) return;
    this.sent = true;
    this.draw();
    this.send("said", { groups: this.groups() });
  }

  leave() {
    if (this.sent) return;
    if (this.stopping) {
      this.sent = true;
      this.send("said", { stop: true });
    }
    this.stopping = true;
    this.draw();
  }

  draw() {
    this.buttons.forEach((button, n) => {
      const place = this.place(n);
      button.dataset.place = place;
      button.querySelector(".zo-rank-place").textContent = place ? nth(place) : "";
      button.setAttribute("aria-pressed", String(place > 0));
    });
    this.equal.setAttribute("aria-pressed", String(Boolean(this.joining)));
    this.equal.disabled = this.undo.disabled = this.sent || !this.steps.length;
    this.alike.disabled = this.stop.disabled = this.sent;
    this.done.disabled = this.sent || !this.steps.length;
    this.done.textContent = this.sent ? "Sent" : "Send (Enter)";
    this.stop.textContent = this.stopping ? "Press again to end the training" : "Stop";
    const ranked = this.groups().flat().length;
    this.status.textContent = this.joining ? "The next one is as good as the last." : `${ranked} of ${this.cards.length} ranked.`;
  }

  key(event) {
    if (!this.root.isConnected) return document.removeEventListener("keydown", this.pressed);
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const target = event.target.closest?.("button, input, textarea, a");
    const keys = { e: () => this.toggleEqual(), "=": () => this.toggleEqual(), u: () => this.back(), Backspace: () => this.back(), 0: () => this.do({ alike: true }) };
    const act = /^[1-9]$/.test(event.key) ? () => this.pick(Number(event.key) - 1) : keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    // Enter presses the button that has the focus; on a card that is ranked, or on none, it sends
    if (event.key === "Enter" && (!target || Number(target.dataset.place))) {
      event.preventDefault();
      this.finish();
    } else if (act && !target?.matches("input, textarea")) {
      event.preventDefault();
      act();
    }
  }
}

export default (c) => {
  if (!made.has(c.parentElement)) made.set(c.parentElement, new Ranking(c.parentElement));
  made.get(c.parentElement).ask(c.data, c.setTriggerValue);
};
