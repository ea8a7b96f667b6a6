"use strict"; // the curves, drawn by uPlot

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
  step: { title: "step", of: (run, { step }) => step },
  tokens: { title: "tokens", of: (run, { step }) => step * run.tokens_per_step },
  time: { title: "wall time", of: (run, { at }) => at === null ? null : at - run.begin },
};
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600,
  43200, 86400, 172800, 432000, 864000, 2592000];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [1, 2], [5, 2]]; // neighbours differ in kind
const FEW = 30; // points are drawn, restarts named
const view = { axis: "step", isLog: false, charts: [] };
window.report = view; // for whoever reads the plots by a program

const xOf = (run, record) => AXES[view.axis].of(run, record);
const marksOf = (run) => run.notes.filter((note) => MARKS[note.kind] && note.step !== null);

// Colours come again after six; with another dash, up to 36.
function lookOf(number) {
  const dash = DASHES[(number + Math.floor(number / 6)) % 6];
  const kind = !dash.length ? "solid" : dash[0] < 5 ? "dotted" : "dashed";
  return { ink: `ink${number % 6}`, dash, kind };
}

function linesOf(key, title) {
  const found = [];
  RUNS.forEach((run, number) => Object.entries(run.curves).forEach(([name, curve]) => {
    const isHeldOut = key === "loss" && name.startsWith("eval_loss");
    if (name !== key && !isHeldOut) return;
    const said = isHeldOut ? name.replace("eval_loss", "held-out") : title.toLowerCase();
    found.push({ run, curve, isHeldOut, ...lookOf(IS_ALONE ? found.length : number),
      label: IS_ALONE ? said : key === "loss" ? `${run.name}, ${said}` : run.name });
  }));
  return found;
}

function pointsOf({ run, curve, isHeldOut }, factor) {
  const points = curve.step.map((step, i) =>
    [xOf(run, { step, at: curve.at[i] }), curve.value[i] * factor]).filter(([x]) => x !== null);
  if (view.axis === "time" && !isHeldOut) { // nothing was measured while nothing ran
    points.push(...run.restarts.map((restart) => [xOf(run, restart), null]));
    points.sort(([a], [b]) => a - b);
  }
  return [points.map(([x]) => x), points.map(([, y]) => y)];
}

function dataOf(lines, factor) {
  const tables = lines.map((line) => pointsOf(line, factor));
  // Marks may lie beyond the last logged step: the axis reaches as far as they do.
  const marks = RUNS.flatMap((run) => marksOf(run).map((note) => xOf(run, note)));
  tables.push([marks.sort((a, b) => a - b), marks.map(() => undefined)]);
  return uPlot.join(tables).slice(0, lines.length + 1);
}

function drawMarks(u, isLoss) {
  const { ctx, bbox } = u, size = devicePixelRatio, bottom = bbox.top + bbox.height;
  const leftOf = (run, record) => Math.round(u.valToPos(xOf(run, record), "x", true));
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 6 * size, bbox.top, bbox.width + 12 * size, bbox.height);
  ctx.clip();
  ctx.textBaseline = "alphabetic";
  ctx.setLineDash([3 * size, 3 * size]);
  RUNS.forEach((run, number) => {
    ctx.globalAlpha = IS_ALONE ? 1 : 0.45;
    ctx.strokeStyle = ctx.fillStyle = color(IS_ALONE ? "soft" : lookOf(number).ink);
    ctx.font = `${11 * size}px sans-serif`;
    ctx.textAlign = "left";
    let labelled = -Infinity;
    run.restarts.forEach((restart, i) => {
      const left = leftOf(run, restart);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bottom);
      ctx.stroke();
      if (isLoss && IS_ALONE && left - labelled > 64 * size) {
        ctx.fillText(`restart ${i + 1}`, left + 4 * size, bbox.top + 12 * size);
        labelled = left;
      }
    });
    ctx.fillStyle = color("ink1");
    ctx.font = `bold ${15 * size}px sans-serif`;
    ctx.textAlign = "center";
    for (const note of isLoss ? marksOf(run) : []) {
      ctx.fillText(MARKS[note.kind][0], leftOf(run, note), bottom - 5 * size);
    }
  });
  ctx.restore();
}

function axesOf(isLog) {
  const isTime = view.axis === "time", isRound = (t) => Number(t.toPrecision(1)) === t;
  const base = { stroke: () => color("soft"), font: "12px system-ui, sans-serif",
    grid: { stroke: () => color("line"), width: 1 },
    ticks: { stroke: () => color("line"), size: 4 } };
  const yTick = (t) => t === null || (isLog && !isRound(Number(t.toPrecision(9)))) ? "" : tick(t);
  return [
    { ...base, size: 34, space: 70, values: (u, ticks) => ticks.map(isTime ? duration : tick),
      ...(isTime ? { incrs: TIME_STEPS } : {}) },
    { ...base, size: 58, values: (u, ticks) => ticks.map(yTick) },
  ];
}

function seriesOf(lines, unit) {
  const xText = view.axis === "time" ? duration : figure;
  return [
    { label: AXES[view.axis].title, value: (u, x) => x === null ? "-" : xText(x) },
    ...lines.map(({ curve, label, ink, dash, isHeldOut }) => ({
      label, dash, stroke: () => color(ink), width: isHeldOut ? 2 : 1.5,
      points: { show: isHeldOut || curve.step.length < FEW, size: 7, fill: () => color("paper") },
      value: (u, y) => y === null || y === undefined ? "-" : `${figure(y)} ${unit}`,
    }))];
}

function plot(place, [key, title, unit]) {
  const lines = linesOf(key, title), isLoss = key === "loss";
  const isLog = view.isLog && lines.every(({ curve }) => curve.value.every((value) => value > 0));
  const ofLine = (what) => (u, i) => what(lines[i - 1]);
  return new uPlot({
    width: place.clientWidth || 600,
    height: isLoss ? 330 : 200,
    cursor: {
      y: false, sync: { key: "runs", scales: ["x", null] }, hover: { skip: [undefined, null] },
      points: { size: 7, width: 0, fill: ofLine(({ ink }) => color(ink)) },
    },
    scales: {
      x: { time: false },
      y: isLog ? { distr: 3, range: (u, low, high) => [low / 1.1, high * 1.1] }
        : { range: { min: { pad: 0.08 }, max: { pad: 0.08 } } },
    },
    axes: axesOf(isLog),
    series: seriesOf(lines, unit),
    legend: { markers: { dash: ofLine(({ kind }) => kind) } },
    hooks: { draw: [(u) => drawMarks(u, isLoss)] },
  }, dataOf(lines, unit === "%" ? 100 : 1), place);
}

function drawPlots() {
  for (const { chart } of view.charts) chart.destroy();
  view.charts = PLOTS.map((each) => [each, document.getElementById(`plot-${each[0]}`)])
    .filter(([, place]) => place)
    .map(([each, place]) => ({ key: each[0], chart: plot(place, each) }));
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
  const marked = new Set(RUNS.flatMap((run) => marksOf(run).map(({ kind }) => kind)));
  return section("Curves",
    el("div", { cls: "bar" }, el("span", { cls: "soft" }, "against"), choices, log),
    el("p", { cls: "note" },
      el("span", { cls: "hint" },
        "Drag to zoom, double click for all; a click on a name hides its curve. "),
      every > 2 ? `Of each ${figure(every)} logged values the extremes are drawn. ` : "",
      RUNS.some((run) => run.restarts.length) ? "Dashed lines: a restart. " : "",
      [...marked].map((each) => `${MARKS[each].join(" ")} `)),
    el("div", { cls: "plots" }, there.map(([key, title, unit]) =>
      el("div", { cls: key === "loss" ? "plot wide" : "plot" },
        el("h3", null, unit ? `${title} (${unit})` : title),
        el("div", { id: `plot-${key}` })))));
}
