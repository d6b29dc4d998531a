// Charts, drawn as SVG. Colours and marks are the same for the same name in every chart.

const CHART = { width: 360, height: 220, left: 46, right: 10, top: 10, bottom: 38 };
const MARKS = 4;
const COLOURS = 6;

const chartNames = [...new Set([...saes.map((sae) => sae.name), ...page.runs.map((run) => run.name)])];

function styleOf(name) {
  const place = chartNames.indexOf(name);
  return { colour: `var(--series-${place % COLOURS})`, mark: place % MARKS };
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Round numbers between two ends, about `count` of them. */
function ticks([low, high], count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= raw) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(6)));
}

function mark(shape, x, y, size) {
  const [s, d] = [size, size * 1.25];
  const paths = [
    `M${x - s},${y}a${s},${s} 0 1,0 ${2 * s},0a${s},${s} 0 1,0 ${-2 * s},0Z`,
    `M${x - s},${y - s}h${2 * s}v${2 * s}h${-2 * s}Z`,
    `M${x},${y - d}L${x + d},${y + s}L${x - d},${y + s}Z`,
    `M${x},${y - d}L${x + d},${y}L${x},${y + d}L${x - d},${y}Z`,
  ];
  return svg("path", { d: paths[shape] });
}

/**
 * Draw a chart. `x` and `y`: {label, range: [low, high], text: tick => string, at: ticks}.
 * `lines`: [{name, points: [[x, y], ...], dashed}]; `bars`: [{from, to, value, text}];
 * `dots`: [{name, x, y, hollow, text}]. `title` says in words what the chart shows.
 */
function chart({ title, caption, x, y, lines = [], bars = [], dots = [] }) {
  const { width, height, left, right, top, bottom } = CHART;
  const [floor, edge] = [height - bottom, width - right];
  const scale = ([low, high], from, to) => (value) =>
    from + ((value - low) / (high - low || 1)) * (to - from);
  const [px, py] = [scale(x.range, left, edge), scale(y.range, floor, top)];
  const text = (axis, value) => (axis.text ?? grouped.format)(value);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  root.append(svg("title", {}, title));
  for (const tick of y.at ?? ticks(y.range, 4)) {
    root.append(
      svg("line", { class: "grid", x1: left, x2: edge, y1: py(tick), y2: py(tick) }),
      svg("text", { x: left - 6, y: py(tick) + 3.5, "text-anchor": "end" }, text(y, tick)),
    );
  }
  for (const tick of x.at ?? ticks(x.range)) {
    root.append(
      svg("line", { class: "tick", x1: px(tick), x2: px(tick), y1: floor, y2: floor + 4 }),
      svg("text", { x: px(tick), y: floor + 15, "text-anchor": "middle" }, text(x, tick)),
    );
  }
  root.append(
    svg("line", { class: "axis", x1: left, x2: edge, y1: floor, y2: floor }),
    svg("text", { class: "label", x: (left + edge) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
  );
  for (const { from, to, value, text: words } of bars) {
    const box = { x: px(from) + 0.5, width: Math.max(0.5, px(to) - px(from) - 1) };
    const rect = { class: "bar-fill", y: py(value), height: floor - py(value), ...box };
    root.append(svg("rect", rect, svg("title", {}, words)));
  }
  for (const { name, points, dashed } of lines) {
    const path = points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" ");
    const line = svg("polyline", { class: dashed ? "line dashed" : "line", points: path });
    line.style.stroke = styleOf(name).colour;
    line.append(svg("title", {}, dashed ? `${name}: chance` : name));
    root.append(line);
  }
  for (const { name, x: a, y: b, hollow, text: words } of dots) {
    const { colour, mark: shape } = styleOf(name);
    const dot = mark(shape, px(a), py(b), 4.5);
    dot.setAttribute("class", hollow ? "dot hollow" : "dot");
    dot.style.stroke = colour;
    if (!hollow) dot.style.fill = colour;
    dot.append(svg("title", {}, words));
    root.append(dot);
  }
  return el("figure", { class: "chart" }, el("figcaption", {}, caption), root);
}

/** The names of the charts, with their marks. */
function legend() {
  const hollow = new Set(page.runs.filter((run) => run.baseline).map((run) => run.name));
  const items = chartNames.map((name) => {
    const { colour, mark: shape } = styleOf(name);
    const sign = mark(shape, 7, 7, 4.5);
    sign.setAttribute("class", hollow.has(name) ? "dot hollow" : "dot");
    sign.style.stroke = colour;
    if (!hollow.has(name)) sign.style.fill = colour;
    const picture = svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, sign);
    return el("li", {}, picture, hollow.has(name) ? `${name} (baseline)` : name);
  });
  return el("ul", { class: "legend" }, ...items);
}

function definedValues(values) {
  return Float64Array.from(values).filter((value) => Number.isFinite(value));
}

/** At most `count` points of a sorted curve, against the rank in [0, 1]. */
function curvePoints(sorted, count = 240) {
  const last = sorted.length - 1;
  const size = Math.min(count, sorted.length);
  return Array.from({ length: size }, (_, i) => {
    const place = Math.round((i / Math.max(1, size - 1)) * last);
    return [last ? place / last : 0, sorted[place]];
  });
}

function scoreCurves() {
  const lines = saes.flatMap(({ name, chance, columns }) => {
    const sorted = definedValues(columns.score).sort().reverse();
    const dashed = { name, points: [[0, chance], [1, chance]], dashed: true };
    return [{ name, points: curvePoints(sorted) }, ...(chance === null ? [] : [dashed])];
  });
  const low = Math.min(0, ...lines.flatMap((line) => line.points.map((point) => point[1])));
  return chart({
    title: "Sorted MonoScore of each SAE's latents, with the chance level dashed",
    caption: "MonoScore, sorted; chance dashed",
    x: { label: "rank of the latent, from 0 to 1", range: [0, 1] },
    y: { range: [Math.max(-1, low), 1] },
    lines,
  });
}

function padded(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || 0.1) * 0.12;
  return [low - room, high + room];
}

function tradeOff() {
  const runs = page.runs.filter((run) => run.r2 !== null && run.monoscore_adjusted !== null);
  if (!runs.length) return null;
  return chart({
    title: "R² and MonoScore above chance of each SAE; baselines are hollow",
    caption: "Above chance against R²; baselines hollow",
    x: { label: "R² of the reconstruction", range: padded(runs.map((run) => run.r2)) },
    y: { range: padded(runs.map((run) => run.monoscore_adjusted)) },
    dots: runs.map((run) => ({
      name: run.name,
      x: run.r2,
      y: run.monoscore_adjusted,
      hollow: run.baseline,
      text: `${run.name}: R² ${number(run.r2)}, above chance ${number(run.monoscore_adjusted)}`,
    })),
  });
}

/** How many latents have a value in each bin, as steps. */
function distribution({ title, caption, column, change = (value) => value, range, bins, ...axes }) {
  const every = saes
    .filter((sae) => sae.columns[column])
    .map((sae) => [sae.name, definedValues(Float64Array.from(sae.columns[column], change))]);
  if (!every.some(([, values]) => values.length)) return null;
  const all = every.flatMap(([, values]) => [...values]);
  const extreme = (best) => all.reduce((a, b) => best(a, b));
  const wholeLow = Math.floor(extreme(Math.min));
  const [low, high] = range ?? [wholeLow, Math.max(wholeLow + 1, Math.ceil(extreme(Math.max)))];
  const lines = every.map(([name, values]) => {
    const counts = new Array(bins).fill(0);
    for (const value of values) {
      const bin = Math.floor(((value - low) / (high - low)) * bins);
      counts[Math.max(0, Math.min(bins - 1, bin))]++;
    }
    const at = (i) => low + ((high - low) * i) / bins;
    return { name, points: counts.flatMap((count, i) => [[at(i), count], [at(i + 1), count]]) };
  });
  const most = Math.max(...lines.flatMap((line) => line.points.map((point) => point[1])));
  return chart({
    title,
    caption,
    x: { label: axes.label, range: [low, high], text: axes.text, at: axes.at?.(low, high) },
    y: { range: [0, most * 1.05] },
    lines,
  });
}

const wholes = (low, high) => ticks([low, high]).filter(Number.isInteger);

/** 10 to an integer, in words that fit under a tick. */
function powerOfTen(power) {
  return power >= 0 && power <= 3 ? String(10 ** power) : `1e${power}`;
}

function renderCharts() {
  const charts = [
    scoreCurves(),
    tradeOff(),
    distribution({
      title: "How many latents have which class purity above chance",
      caption: "Latents by class purity above chance",
      column: "purity_adjusted",
      range: [-0.2, 1],
      bins: 30,
      label: "purity above chance",
    }),
    distribution({
      title: "How many latents are active on which share of the images",
      caption: "Latents by frequency, without dead ones",
      column: "frequency",
      change: (value) => Math.log10(value),
      bins: 30,
      label: "share of images that activate it",
      text: powerOfTen,
      at: wholes,
    }),
    distribution({
      title: "How many latents are activated by how many images",
      caption: "Latents by number of images, without dead ones",
      column: "support",
      change: (value) => Math.log10(value),
      bins: 30,
      label: "images that activate it",
      text: powerOfTen,
      at: wholes,
    }),
  ];
  const place = document.getElementById("charts");
  place.append(legend(), ...charts.filter(Boolean));
}
