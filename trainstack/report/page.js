"use strict"; // words and tables; curves.js has the curves

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, RUN = RUNS[0], IS_ALONE = RUNS.length === 1;
// --- Words and figures

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function figure(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", size < 1000 ? { maximumSignificantDigits: 5 }
    : { maximumFractionDigits: 0 });
}

function tick(value) {
  const size = Math.abs(value);
  if (size === 0 || (size >= 1e-3 && size < 1e3)) return String(Number(value.toPrecision(5)));
  if (size < 1) return value.toExponential(1).replace(".0e", "e");
  return size < 1e5 ? value.toLocaleString("en") : compact.format(value);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 60) return `${Number(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([size]) => seconds >= size);
  const [[large, name], [small, second]] = [parts[first], parts[first + 1]];
  const rest = Math.floor((seconds % large) / small);
  return `${Math.floor(seconds / large)} ${name}${rest ? ` ${rest} ${second}` : ""}`;
}

const counted = (number, noun) => `${figure(number)} ${noun}${number === 1 ? "" : "s"}`;
const clock = (at) => new Date(at * 1000).toISOString().slice(0, 19).replace("T", " ") + "Z";
const when = (at) => el("time", null, clock(at));
const percent = (part, whole) => whole ? `${(100 * part / whole).toFixed(1)} %` : "-";
const shown = (value) => typeof value === "string" ? value : JSON.stringify(value);
const total = (spent) => Object.values(spent).reduce((sum, seconds) => sum + seconds, 0);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);

// --- Elements; texts never become markup

function el(tag, options, ...children) {
  const { cls, style, ...rest } = options || {};
  const element = Object.assign(document.createElement(tag), rest);
  if (cls) element.className = cls;
  Object.assign(element.style, style);
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined));
  return element;
}

function table(head, rows, numbers = []) {
  const cls = (i) => numbers.includes(i) ? "number" : "";
  const cells = (tag, row) => row.map((cell, i) => el(tag, { cls: cls(i) }, cell));
  return el("div", { cls: "scroll" }, el("table", null,
    el("thead", null, el("tr", null, cells("th", head))),
    el("tbody", null, rows.map((row) => el("tr", null, cells("td", row))))));
}

function section(title, ...content) {
  return el("section", null, el("h2", null, title), ...content);
}

const folded = (title, ...content) => el("details", null, el("summary", null, title), ...content);

// --- The head

const LIVE = ["RUNNING", "STARTING", "QUEUED", "PAUSED", "RESTARTING"];
const kind = ({ state }) => state === "DONE" ? "good"
  : LIVE.includes(state.split(", ")[0]) ? "open" : "bad";

function stepsText(run) {
  if (!run.max_steps) return figure(run.step);
  return `${figure(run.step)} of ${figure(run.max_steps)}`;
}

function figures(run) {
  const { measured, evaluated } = run, wall = total(run.spent);
  return [
    ["step", stepsText(run), run.max_steps ? percent(run.step, run.max_steps) : ""],
    ["loss", figure(measured.loss), `at step ${figure(measured.step)}`],
    ["held-out loss", figure(evaluated.eval_loss), `at step ${figure(evaluated.step)}`],
    ["tokens/s", figure(measured.tokens_per_second), "in the last logged steps"],
    ["MFU", measured.mfu ? percent(measured.mfu, 1) : "-", "of the peak of all GPUs"],
    ["time left", duration(run.seconds_left), "to the last step"],
    ["duration", wall ? duration(wall) : "-",
      counted(run.rows.filter((row) => row.name).length, "attempt")],
    ["goodput", percent(run.spent.training, wall), run.restarts.length
      ? `${counted(run.redone_steps, "step")} redone` : "of the time, in training"],
  ].filter(([, value]) => value !== "-");
}

function head() {
  const button = el("button", { onclick: switchTheme, title: "light or dark" }, "Light / dark");
  if (!IS_ALONE) {
    const names = [...new Set(RUNS.flatMap((run) => figures(run).map(([name]) => name)))];
    const rows = RUNS.map((run, i) => {
      const found = Object.fromEntries(figures(run)), { ink, kind } = lookOf(i);
      const style = { borderTop: `3px ${kind} var(--${ink})` };
      const swatch = el("i", { cls: "swatch line", style });
      return [el("span", null, swatch, run.name), run.state,
        ...names.map((name) => found[name] ?? "-")];
    });
    return [el("header", null, el("h1", null, RUNS.map((run) => run.name).join(" · ")), button),
      section("The runs", table(["run", "state", ...names], rows))];
  }
  const why = [["Why", RUN.cause], ["Next", RUN.next]].filter(([, text]) => text);
  const span = RUN.begin ? ` · from ${clock(RUN.begin)} to ${clock(RUN.end)}` : "";
  return [
    el("header", null, el("h1", null, RUN.name),
      el("span", { cls: `state ${kind(RUN)}` }, RUN.state), el("span", null, RUN.meaning), button),
    el("p", { cls: "note" }, RUN.folder, span),
    why.length ? el("div", { cls: `why ${kind(RUN)}` }, why.map(([name, text]) =>
      el("p", null, el("b", null, `${name}: `), text))) : null,
    el("div", { cls: "tiles" }, figures(RUN).map(([name, value, note]) =>
      el("div", { cls: "tile" }, el("span", null, name), el("b", null, value),
        el("span", null, note)))),
  ];
}

// --- Where the time went

function timeline() {
  const wall = RUN.end - RUN.begin;
  if (!RUN.rows.length || !wall) return null;
  const left = (at) => `${100 * (at - RUN.begin) / wall}%`;
  const rows = RUN.rows.map((row, number) => el("div", { cls: "row" },
    el("span", { title: row.name || "" }, row.name ? `attempt ${number + 1}` : "since then"),
    el("div", { cls: "track" }, row.parts.map(([cause, begin, end]) => el("div", {
      cls: `part ${cause}`, title: `${cause}, ${duration(end - begin)}, from ${clock(begin)}`,
      style: { left: left(begin), width: `${100 * (end - begin) / wall}%` },
    }, el("span", null, cause)))),
    el("span", { cls: "note" }, [row.steps && `steps ${row.steps.map(figure).join(" to ")}`,
      row.end].filter(Boolean).join("; "))));
  const spent = Object.entries(RUN.spent).filter(([, seconds]) => seconds > 0);
  return section("Where the time went", rows,
    el("div", { cls: "scale note" }, when(RUN.begin), when(RUN.end)),
    table(["cause", "time", "share", "what it is"], spent.map(([cause, seconds]) => [
      el("span", { cls: "number" }, el("i", { cls: `swatch ${cause}` }), cause), duration(seconds),
      percent(seconds, wall), DATA.causes[cause]]), [1, 2]));
}

// --- Settings

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function settings() {
  const columns = IS_ALONE ? [["shipped", RUN.shipped], ["this run", RUN.settings]]
    : RUNS.map((run) => [run.name, run.settings]);
  const keys = [...new Set(columns.flatMap(([, values]) => Object.keys(values)))];
  const cell = (values, key) => key in values ? el("code", null, shown(values[key])) : "-";
  const [[, first]] = columns;
  const differ = keys.filter((key) => columns.some(([, values]) => !same(values[key], first[key])));
  const rows = (chosen) => chosen.map((key) => [el("code", null, key),
    ...columns.map(([, values]) => cell(values, key))]);
  const names = ["setting", ...columns.map(([name]) => name)];
  const title = IS_ALONE ? "What differs from the config.yaml of its code" : "Settings that differ";
  if (columns.some(([, values]) => !Object.keys(values).length)) return null;
  return section(title, differ.length ? table(names, rows(differ)) : el("p", null, "Nothing."),
    folded(`all ${keys.length} settings`, table(names, rows(keys))));
}

// --- The rest of one run

function sources() {
  const given = Object.entries(RUN.measured.source_tokens || {});
  const all = given.reduce((sum, [, tokens]) => sum + tokens, 0);
  return given.length ? section("Tokens per data set", table(["data set", "tokens", "share", ""],
    given.map(([name, tokens]) => [name, figure(tokens), percent(tokens, all),
      el("span", { cls: "share", style: { width: `${160 * tokens / all}px` } })]), [1, 2])) : null;
}

function notes() {
  return RUN.notes.length ? section("What happened", table(["when", "step", "what"],
    RUN.notes.map(({ at, step, text }) => [when(at), figure(step), text]), [1])) : null;
}

function checkpoints() {
  const size = (bytes) => !bytes ? "-" : bytes < 1e9 ? `${figure(bytes / 1e6)} MB`
    : `${figure(bytes / 1e9)} GB`;
  return RUN.checkpoints.length ? section("Checkpoints", el("div", { cls: "facts" },
    table(["step", "when", "size", "written in", "training waited", ""],
      RUN.checkpoints.map((c) => [figure(c.step), when(c.at), size(c.bytes), duration(c.seconds),
        duration(c.stall), c.is_best ? "kept, the best" : c.is_kept ? "kept" : ""]),
    [0, 2, 3, 4]))) : null;
}

function samples() {
  return RUN.samples.length ? section("What it says", RUN.samples.map(({ step, text }) => [
    el("p", { cls: "soft" }, `at step ${figure(step)}`), el("pre", null, text)])) : null;
}

function ledger() {
  if (!RUN.ledger) return null;
  const isChecked = RUN.ledger.lines.some((line) => line.includes("repeated ="));
  const said = !isChecked ? "This cannot be told now." : RUN.ledger.code === 0 ? "Yes." : "No.";
  return section("Was every sample used exactly once?", el("p", null, said),
    el("pre", null, RUN.ledger.lines.join("\n")));
}

function environment() {
  const { packages, ranks, nodes, uncommitted_lines: lines, ...rest } = RUN.environment;
  const rows = Object.entries(rest).filter(([, value]) => value)
    .map(([name, value]) => [name.replace("_", " "), value]);
  if (lines) rows.push(["uncommitted", `${figure(lines)} lines`]);
  if (nodes.length) rows.push(["nodes", nodes.join(", ")]);
  for (const name of ["torch", "transformers"]) {
    if (packages?.[name]) rows.push([name, packages[name]]);
  }
  return section("Environment", table(["", ""], rows),
    ranks.length ? folded("ranks of the last attempt", el("pre", null, ranks.join("\n"))) : null,
    packages ? folded(`all ${Object.keys(packages).length} packages`,
      el("pre", null, Object.entries(packages).map((each) => each.join(" ")).join("\n"))) : null);
}

// --- Light and dark

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  if (view.charts.length) drawPlots();
}

function switchTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("page").append(...[
  ...head(), ...(IS_ALONE ? [curves(), timeline(), sources(), notes(), checkpoints(), settings(),
    samples(), ledger(), environment()] : [settings(), curves()]),
  el("p", { cls: "note" },
    `Written ${clock(DATA.made_at)}. The figures are JSON in this page's source.`),
].filter(Boolean));
drawPlots();
addEventListener("resize", resizePlots);
let before = "light";
addEventListener("beforeprint", () => {
  before = document.documentElement.dataset.theme;
  document.body.classList.add("printing");
  setTheme("light");
});
addEventListener("afterprint", () => {
  document.body.classList.remove("printing");
  setTheme(before);
});
