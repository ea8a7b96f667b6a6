"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, RUN = RUNS[0], IS_ALONE = RUNS.length === 1;
const PLOTS = [ // curve, title, unit of its values
  ["loss", "Loss", ""],
  ["learning_rate", "Learning rate", ""],
  ["grad_norm", "Gradient norm", ""],
  ["tokens_per_second", "Throughput", "tokens/s"],
  ["mfu", "MFU", "%"],
  ["peak_memory_gb", "Peak memory", "GB"],
  ["data_seconds", "Wait for data in a step", "s"],
  ["slowest_ratio", "Slowest rank, as a multiple of the median", ""],
];
const MARKS = { // events that are marked on the loss: sign, meaning
  skip: ["×", "update left out"],
  rollback: ["↶", "rollback"],
  save_failed: ["!", "save failed"],
  slow_rank: ["◆", "slow rank"],
};
const AXES = {
  step: { title: "step", of: (run, step) => step },
  tokens: { title: "tokens", of: (run, step) => step * run.tokens_per_step },
  time: { title: "wall time", of: (run, step, at) => at === null ? null : at - run.begin },
};
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600,
  43200, 86400, 172800, 432800, 864000, 2592000];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2]];
const view = { axis: "step", isLog: false, charts: [] };
window.report = view; // for whoever reads the plots by a program

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

const kind = (run) => run.state === "DONE" ? "good"
  : ["RUNNING", "STARTING", "QUEUED", "PAUSED", "RESTARTING"].includes(run.state) ? "open" : "bad";

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
    ["duration", wall ? duration(wall) : "-", counted(run.rows.filter((row) => row.name).length, "attempt")],
    ["goodput", percent(run.spent.training, wall), `${counted(run.redone_steps, "step")} redone`],
  ].filter(([, value]) => value !== "-");
}

function head() {
  const button = el("button", { onclick: switchTheme, title: "light or dark" }, "Light / dark");
  if (!IS_ALONE) {
    const names = ["", ...figures(RUN).map(([name]) => name)];
    return [el("header", null, el("h1", null, RUNS.map((run) => run.name).join(" · ")), button),
      section("The runs", table(["run", "state", ...names.slice(1)], RUNS.map((run, i) => {
        const found = Object.fromEntries(figures(run));
        return [el("span", null, el("i", { cls: "swatch", style: { background: `var(--ink${i % 6})` } }),
          run.name), run.state, ...names.slice(1).map((name) => found[name] ?? "-")];
      })))];
  }
  const why = [["Why", RUN.cause], ["Next", RUN.next]].filter(([, text]) => text);
  return [
    el("header", null, el("h1", null, RUN.name), el("span", { cls: `state ${kind(RUN)}` }, RUN.state),
      el("span", null, RUN.meaning), button),
    el("p", { cls: "note" }, RUN.folder, RUN.begin ? ` · from ${clock(RUN.begin)} to ${clock(RUN.end)}` : ""),
    why.length ? el("div", { cls: `why ${kind(RUN)}` }, why.map(([name, text]) =>
      el("p", null, el("b", null, `${name}: `), text))) : null,
    el("div", { cls: "tiles" }, figures(RUN).map(([name, value, note]) =>
      el("div", { cls: "tile" }, el("span", null, name), el("b", null, value), el("span", null, note)))),
  ];
}

// --- The curves

function linesOf(key, title) {
  const found = [];
  RUNS.forEach((run, number) => Object.entries(run.curves).forEach(([name, curve]) => {
    const isHeldOut = key === "loss" && name.startsWith("eval_loss");
    if (name !== key && !isHeldOut) return;
    const said = isHeldOut ? name.replace("eval_loss", "held-out") : title.toLowerCase();
    const alone = IS_ALONE ? found.length : number;
    found.push({ run, curve, isHeldOut, ink: `ink${alone % 6}`,
      dash: isHeldOut ? [6, 4] : IS_ALONE ? [] : DASHES[number % 6],
      label: IS_ALONE ? said : key === "loss" ? `${run.name}, ${said}` : run.name });
  }));
  return found;
}

function pointsOf({ run, curve, isHeldOut }, factor) {
  const points = curve.step.map((step, i) =>
    [AXES[view.axis].of(run, step, curve.at[i]), curve.value[i] * factor]);
  // Nothing was measured while nothing ran.
  const gaps = view.axis === "time" && !isHeldOut ? run.restarts : [];
  points.push(...gaps.map(({ at }) => [at - run.begin, null]));
  const marks = run.notes.filter((note) => MARKS[note.kind] && note.step !== null);
  points.push(...marks.map(({ step, at }) => [AXES[view.axis].of(run, step, at), undefined]));
  const kept = points.filter(([x]) => x !== null).sort(([a], [b]) => a - b);
  return [kept.map(([x]) => x), kept.map(([, y]) => y)];
}

const xText = (value) => view.axis === "time" ? duration(value) : figure(value);

function drawMarks(u, isLoss) {
  const { ctx, bbox } = u, size = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.font = `${11 * size}px sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.setLineDash([3 * size, 3 * size]);
  RUNS.forEach((run, number) => {
    ctx.globalAlpha = IS_ALONE ? 1 : 0.45;
    ctx.strokeStyle = ctx.fillStyle = color(IS_ALONE ? "soft" : `ink${number % 6}`);
    run.restarts.forEach((restart, i) => {
      const left = Math.round(u.valToPos(AXES[view.axis].of(run, restart.step, restart.at), "x", true));
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      if (isLoss && IS_ALONE && run.restarts.length < 30) {
        ctx.fillText(`restart ${i + 1}`, left + 4 * size, bbox.top + 12 * size);
      }
    });
    ctx.fillStyle = color("ink1");
    ctx.font = `bold ${15 * size}px sans-serif`;
    for (const note of isLoss ? run.notes : []) {
      if (!MARKS[note.kind] || note.step === null) continue;
      const left = u.valToPos(AXES[view.axis].of(run, note.step, note.at), "x", true);
      ctx.fillText(MARKS[note.kind][0], left - 5 * size, bbox.top + bbox.height - 5 * size);
    }
    ctx.font = `${11 * size}px sans-serif`;
  });
  ctx.restore();
}

function plot(place, [key, title, unit]) {
  const lines = linesOf(key, title), factor = unit === "%" ? 100 : 1, isLoss = key === "loss";
  const isLog = view.isLog && lines.every(({ curve }) => curve.value.every((value) => value > 0));
  const axis = { stroke: () => color("soft"), grid: { stroke: () => color("line"), width: 1 },
    ticks: { stroke: () => color("line"), size: 4 }, font: "12px system-ui, sans-serif" };
  return new uPlot({
    width: place.clientWidth || 600, height: isLoss ? 330 : 200,
    cursor: { sync: { key: "runs", scales: ["x", null] }, y: false,
      hover: { skip: [undefined, null] }, points: { size: 7, width: 0, fill: (u, i) => color(lines[i - 1].ink) } },
    scales: { x: { time: false }, y: { distr: isLog ? 3 : 1,
      range: isLog ? (u, low, high) => [low / 1.1, high * 1.1] : { min: { pad: 0.08 }, max: { pad: 0.08 } } } },
    axes: [
      { ...axis, size: 34, values: (u, ticks) => ticks.map(view.axis === "time" ? duration : tick), space: 70,
        ...(view.axis === "time" ? { incrs: TIME_STEPS } : {}) },
      { ...axis, size: 58, values: (u, ticks) => ticks.map((t) =>
        t === null || (isLog && Number(t.toPrecision(1)) !== Number(t.toPrecision(9))) ? "" : tick(t)) },
    ],
    series: [{ label: AXES[view.axis].title, value: (u, x) => x === null ? "-" : xText(x) },
      ...lines.map(({ curve, label, ink, dash, isHeldOut }) => ({
        label, stroke: () => color(ink), dash, width: isHeldOut ? 2 : 1.5,
        points: { show: isHeldOut || curve.step.length < 30, size: 7, fill: () => color("paper") },
        value: (u, y) => y === null || y === undefined ? "-" : `${figure(y)} ${unit}`,
      }))],
    legend: { markers: { dash: (u, i) => lines[i - 1].dash.length ? "dashed" : "solid" } },
    hooks: { draw: [(u) => drawMarks(u, isLoss)] },
  }, uPlot.join(lines.map((line) => pointsOf(line, factor))), place);
}

function drawPlots() {
  for (const { chart } of view.charts) chart.destroy();
  view.charts = PLOTS.filter(([key]) => document.getElementById(`plot-${key}`)).map((each) =>
    ({ key: each[0], chart: plot(document.getElementById(`plot-${each[0]}`), each) }));
}

function resizePlots() {
  for (const { chart } of view.charts) {
    const width = chart.root.parentElement.clientWidth;
    if (width && width !== chart.width) chart.setSize({ width, height: chart.height });
  }
}

function curves() {
  const there = PLOTS.filter(([key, title]) => linesOf(key, title).length);
  if (!there.length) return null;
  const choices = Object.entries(AXES).map(([name, { title }]) => el("label", null,
    el("input", { type: "radio", name: "axis", value: name, checked: name === view.axis,
      onchange: () => { view.axis = name; drawPlots(); } }), ` ${title}`));
  const log = el("label", null, el("input", { type: "checkbox", id: "log",
    onchange: (event) => { view.isLog = event.target.checked; drawPlots(); } }), " log scale");
  const every = Math.max(...RUNS.flatMap((run) => Object.values(run.curves).map((c) => c.every)));
  const marked = Object.entries(MARKS).filter(([name]) =>
    RUNS.some((run) => run.notes.some((note) => note.kind === name)));
  return section("Curves",
    el("div", { cls: "bar" }, el("span", { cls: "soft" }, "against"), choices, log),
    el("p", { cls: "note" }, el("span", { cls: "hint" },
      "Drag to zoom, double click for all; a click on a name hides its curve. "),
    every > 2 ? `Of each ${figure(every)} logged values the least and the greatest are drawn. ` : "",
    RUNS.some((run) => run.restarts.length) ? "Dashed lines: a restart from a checkpoint. " : "",
    marked.map(([, [sign, meaning]]) => `${sign} ${meaning} `)),
    el("div", { cls: "plots" }, there.map(([key, title, unit]) =>
      el("div", { cls: key === "loss" ? "plot wide" : "plot" },
        el("h3", null, unit ? `${title} (${unit})` : title),
        el("div", { id: `plot-${key}` })))));
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
    el("span", { cls: "note" }, [row.steps ? `steps ${row.steps.map(figure).join(" to ")}` : "", row.end]
      .filter(Boolean).join("; "))));
  const spent = Object.entries(RUN.spent).filter(([, seconds]) => seconds > 0);
  return section("Where the time went", rows,
    el("div", { cls: "scale" }, el("span", null, clock(RUN.begin)), el("span", null, clock(RUN.end))),
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
  const differ = keys.filter((key) => columns.some(([, values]) => !same(values[key], columns[0][1][key])));
  const rows = (chosen) => chosen.map((key) => [el("code", null, key),
    ...columns.map(([, values]) => cell(values, key))]);
  const names = ["setting", ...columns.map(([name]) => name)];
  const title = IS_ALONE ? "What differs from the configuration of its code" : "Settings that differ";
  if (!keys.length) return null;
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
  const size = (bytes) => bytes ? `${figure(bytes / 1e9)} GB` : "-";
  return RUN.checkpoints.length ? section("Checkpoints", el("div", { cls: "facts" },
    table(["step", "when", "size", "written in", "training waited", ""], RUN.checkpoints.map((c) => [
      figure(c.step), when(c.at), size(c.bytes), duration(c.seconds), duration(c.stall),
      c.is_kept ? "kept" : ""]), [0, 2, 3, 4]))) : null;
}

function samples() {
  return RUN.samples.length ? section("What it says", RUN.samples.map(({ step, text }) => [
    el("p", { cls: "soft" }, `at step ${figure(step)}`), el("pre", null, text)])) : null;
}

function ledger() {
  if (!RUN.ledger) return null;
  const said = ["Every sample was used as it should be.", "Samples were repeated or left out.",
    "This could not be told."][RUN.ledger.code] || "This could not be told.";
  return section("Was every sample used exactly once?", el("p", null, said),
    el("pre", null, RUN.ledger.lines.join("\n")));
}

function environment() {
  const { packages, ranks, nodes, uncommitted_lines: lines, ...rest } = RUN.environment;
  const rows = Object.entries(rest).filter(([, value]) => value).map(([k, v]) => [k.replace("_", " "), v]);
  if (lines) rows.push(["uncommitted", `${figure(lines)} lines`]);
  if (nodes.length) rows.push(["nodes", nodes.join(", ")]);
  for (const name of ["torch", "transformers"]) if (packages?.[name]) rows.push([name, packages[name]]);
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
  el("p", { cls: "note" }, `Written ${clock(DATA.made_at)}. The figures are JSON in this page's source.`),
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
