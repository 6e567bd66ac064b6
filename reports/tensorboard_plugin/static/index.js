// The tab "Stability". TensorBoard imports this module into a frame of its own and calls render().

import { el, show, count, waiting } from "./dom.js";
import { fetchRuns } from "./data.js";
import { followTheme, onReload, seen } from "./host.js";
import { RunView } from "./run_view.js";
import { CompareView } from "./compare_view.js";

const POLL = 2000;
const SOON = 400;

/** Builds the page. */
export async function render() {
  document.documentElement.lang = "en";
  document.title = "Stability";
  await styled();
  new Page(document.body).start();
}

function styled() {
  const link = el("link", { rel: "stylesheet", href: new URL("./style.css", import.meta.url).href });
  const loaded = new Promise((resolve) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", resolve);
  });
  document.head.append(link);
  return loaded;
}

class Page {
  constructor(body) {
    this.runs = [];
    this.looked = false;
    this.run = null;
    this.list = el("ul", { class: "runs" });
    this.heading = el("h1", {}, "Runs");
    this.tabs = ["run", "compare"].map((name) => el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`,
      click: () => this.open(name), keydown: (event) => this.turn(event) }, name === "run" ? "One run" : "Compare runs"));
    this.panels = ["run", "compare"].map((name) => el("section", { role: "tabpanel", id: `view-${name}`, "aria-labelledby": `tab-${name}` }));
    this.status = el("p", { class: "status", role: "status" });
    this.runView = new RunView(this.panels[0], () => this.poll());
    this.compareView = new CompareView(this.panels[1], (run) => this.choose(run), () => this.poll());
    body.append(el("div", { class: "page" },
      el("nav", { "aria-label": "Runs" }, this.heading, this.list),
      el("main", {}, el("div", { class: "tabs", role: "tablist", "aria-label": "Views" }, this.tabs), this.status, this.panels)));
    this.open("run");
  }

  start() {
    followTheme(() => this.redraw());
    onReload(() => this.poll());
    document.addEventListener("visibilitychange", () => this.poll());
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      this.redraw();
      this.poll();
    });
    this.poll();
    setInterval(() => this.poll(), POLL);
  }

  redraw() {
    this.runView.redraw();
    this.compareView.redraw();
  }

  /** One round: what runs there are, then whatever of the open view has changed. Never two at once. */
  async poll() {
    if (this.polling || !seen()) return;
    this.polling = true;
    try {
      const { looked, runs } = await fetchRuns();
      this.runs = runs;
      this.looked = looked;
      if (!runs.some((run) => run.id === this.run)) this.run = (runs.find((run) => run.state === "read") ?? runs[0])?.id ?? null;
      this.drawList();
      await this.refresh();
      show(this.status, this.looked && !runs.length ? "No run file (run.db) lies under the logdir any more." : "");
    } catch (error) {
      show(this.status, error.status ? `TensorBoard answered: ${error.message}` : "TensorBoard does not answer; trying again.");
    } finally {
      this.polling = false;
    }
    if (this.runView.waits || this.runs.some((run) => run.state === "unread")) setTimeout(() => this.poll(), SOON);
  }

  async refresh() {
    if (this.view === "compare") await this.compareView.update(this.runs);
    else await this.runView.update(this.runs.find((run) => run.id === this.run) ?? null);
  }

  async choose(run) {
    this.run = run;
    this.drawList();
    this.open("run");
    await this.safely();
  }

  open(name) {
    this.view = name;
    ["run", "compare"].forEach((each, at) => {
      this.tabs[at].setAttribute("aria-selected", String(each === name));
      this.tabs[at].tabIndex = each === name ? 0 : -1;
      this.panels[at].hidden = each !== name;
    });
    this.safely();
  }

  async safely() {
    try {
      await this.refresh();
    } catch {
      this.poll(); // says what is wrong, and tries again
    }
  }

  turn(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    this.open(this.view === "run" ? "compare" : "run");
    this.tabs[this.view === "run" ? 0 : 1].focus();
  }

  drawList() {
    show(this.heading, "Runs ", el("span", { class: "muted" }, String(this.runs.length)));
    const focused = document.activeElement?.dataset?.run;
    show(this.list, this.runs.map((run) => el("li", {}, this.entry(run))));
    if (focused !== undefined) [...this.list.querySelectorAll("button")].find((button) => button.dataset.run === focused)?.focus();
  }

  entry(run) {
    const look = run.state === "read" ? `v-${run.verdict}` : "v-none";
    const about = run.state === "unreadable" ? "can't be read" : run.state === "unread" ? waiting(run) : `${run.word.toLowerCase()} · ${count(run.edits, "edit")}`;
    return el("button", { type: "button", class: `run ${look}`, "data-run": run.id, "aria-current": run.id === this.run ? "true" : null, click: () => this.choose(run.id) },
      el("span", { class: "sign", "aria-hidden": "true" }, run.sign ?? (run.state === "unreadable" ? "!" : "…")),
      el("span", { class: "run-text" }, el("span", { class: "run-name" }, run.name),
        el("span", { class: "run-about" }, about, run.state === "read" && !run.complete ? el("span", { class: "live" }, "not closed") : null)));
  }
}
