"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const pick = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const percent = (share) => `${(100 * share).toPrecision(2)}%`;

// Plotly reads a little HTML in its texts: labels from outside must not be part of it.
const plain = (label) => label.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function unpack({ bits, data: text }) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const Type = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array }[bits];
  return Array.from(new Type(bytes.buffer));
}

// ---- passages and answers: what does not hold the text is hidden -----------------------------
$("find")?.addEventListener("input", ({ target }) => {
  const wanted = target.value.toLowerCase();
  const all = [...document.querySelectorAll(".passage")];
  all.forEach((one) => { one.hidden = !one.textContent.toLowerCase().includes(wanted); });
  $("found").textContent = wanted ? `${all.filter((one) => !one.hidden).length} of ${all.length}` : "";
});

// ---- histograms: counts[p][h] flat, p first --------------------------------------------------
const [P, H] = data.bins;

function rows(counts, merge) {
  const out = Array.from({ length: H / merge }, () => new Array(P / merge).fill(0));
  counts.forEach((n, i) => { out[Math.floor((i % H) / merge)][Math.floor(i / H / merge)] += n; });
  return out;
}

function marginal(counts, bins, index) {
  const out = new Array(bins).fill(0);
  counts.forEach((n, i) => { out[index(i)] += n; });
  return out;
}

const centres = (bins) => Array.from({ length: bins }, (_, i) => (i + 0.5) / bins);

// ---- look ------------------------------------------------------------------------------------
const ramp = () => [[0, css("--low")], [0.45, css("--mid")], [1, css("--high")]];
const diverging = () => [[0, css("--base")], [0.5, css("--paper")], [1, css("--candidate")]];
const touch = matchMedia("(pointer: coarse)").matches;

function axis(title, more) {
  return { title: { text: title, standoff: 6 }, color: css("--muted"), gridcolor: css("--rule"),
    linecolor: css("--rule"), zeroline: false, ticks: "outside", tickcolor: css("--rule"), ...more };
}

function draw(id, traces, layout, label) {
  const whole = { margin: { l: 48, r: 10, t: 10, b: 44 }, showlegend: false, dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: css("--sans"), size: 12, color: css("--ink") },
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--muted"), font: { color: css("--ink") } }, ...layout };
  const node = $(id);
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
  const fresh = !node.on;
  const done = Plotly.react(node, traces, whole, { displayModeBar: false, responsive: true });
  if (fresh) node.on("plotly_afterplot", () => scalable(node));
  scalable(node);
  return done;
}

// Drawn in pixels of the screen: a box of its own lets paper, which has other widths, scale the drawing.
function scalable(node) {
  const { width, height } = node._fullLayout;
  for (const svg of node.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
}

const bar = (tickvals, ticktext) => ({ orientation: "h", thickness: 7, len: 1, y: -0.2, yanchor: "top", outlinewidth: 0,
  tickvals, ticktext, tickfont: { color: css("--muted"), size: 11 } });
const short = (n) => (n >= 1e6 ? `${n / 1e6}M` : n >= 1e3 ? `${n / 1e3}k` : `${n}`);
const small = (x) => (x < 1e-3 ? x.toExponential(0) : x.toPrecision(2));

// Round counts up to `top`: powers of ten, or 1, 2, 5, 10 ... where those would be too few.
function ladder(top) {
  const powers = Array.from({ length: 10 }, (_, e) => 10 ** e);
  return (top < 50 ? powers.flatMap((n) => [n, 2 * n, 5 * n]) : powers).filter((n) => n <= top);
}

// ---- the (p, H) plane ------------------------------------------------------------------------
function conflictRegion({ pq, hq }) {
  const line = { color: css("--fail"), width: 1, dash: "dot" };
  return [
    { type: "rect", x0: 0, x1: pq, y0: 0, y1: hq, fillcolor: css("--shade"), line: { color: css("--fail"), width: 1 } },
    { type: "line", x0: pq, x1: pq, y0: 0, y1: 1, line },
    { type: "line", x0: 0, x1: 1, y0: hq, y1: hq, line },
  ];
}

function plane(id, z, counts, { colorscale, zmin, zmax, colorbar, model, hover, label }) {
  const height = z.length, width = z[0].length;
  const note = { showarrow: false, font: { size: 11, color: css("--fail") }, bgcolor: css("--paper"), opacity: 0.9 };
  draw(id, [{ type: "heatmap", x: centres(width), y: centres(height), z, customdata: counts, colorscale, zmin, zmax,
    colorbar, hoverongaps: false, hovertemplate: `p %{x:.3f}<br>H %{y:.3f}<br>${hover}<extra></extra>` }], {
    margin: { l: 48, r: 10, t: 10, b: 84 },
    xaxis: axis("p", { range: [0, 1], constrain: "domain", showgrid: false }),
    yaxis: axis("H", { range: [0, 1], showgrid: false }),
    shapes: conflictRegion(model),
    annotations: [
      { ...note, x: model.pq, y: 1, xanchor: "left", yanchor: "top", text: `p ≤ ${small(model.pq)}` },
      { ...note, x: 1, y: model.hq, xanchor: "right", yanchor: "bottom", text: `H ≤ ${small(model.hq)}` },
    ],
  }, label);
}

function drawPlanes(view, base, candidate, names) {
  const [a, b] = [unpack(base.histogram), unpack(candidate.histogram)];
  const fine = view.tokens < 5000 ? 4 : 1; // single tokens in full resolution would be invisible
  const most = Math.max(2, ...[a, b].flatMap((counts) => rows(counts, fine).map((r) => Math.max(...r))));
  const steps = ladder(most);
  const log = (n) => (n > 0 ? Math.log10(n) : null);
  for (const [id, counts, model, name] of [["base", a, base, names[0]], ["candidate", b, candidate, names[1]]]) {
    const grid = rows(counts, fine);
    plane(`plot-${id}`, grid.map((r) => r.map(log)), grid, { colorscale: ramp(), zmin: 0, zmax: Math.log10(most), model,
      colorbar: bar(steps.map(Math.log10), steps.map(short)), hover: "%{customdata:,} tokens",
      label: `Density of p and H for ${name}` });
    $(`cap-${id}`).replaceChildren(bold(name), ` Tokens per bin, log scale`);
  }
  const merge = P >= 160 ? 4 : 2;
  const [ga, gb] = [rows(a, merge), rows(b, merge)];
  const change = gb.map((r, j) => r.map((n, i) => n - ga[j][i]));
  const signed = change.map((r, j) => r.map((d, i) => (ga[j][i] + gb[j][i] ? Math.sign(d) * Math.log10(1 + Math.abs(d)) : null)));
  const largest = Math.max(2, ...change.flat().map(Math.abs));
  const reach = Math.log10(1 + largest);
  const marks = ladder(largest).filter((n) => n > 1 || largest < 50);
  const ticks = [...marks.map((n) => -n).reverse(), 0, ...marks];
  plane("plot-difference", signed, change, { colorscale: diverging(), zmin: -reach, zmax: reach, model: base,
    colorbar: bar(ticks.map((n) => Math.sign(n) * Math.log10(1 + Math.abs(n))),
      ticks.map((n) => (n > 0 ? "+" : n < 0 ? "−" : "") + short(Math.abs(n)))),
    hover: "%{customdata:+,} tokens", label: `Difference of the two densities` });
  $("cap-difference").replaceChildren(bold("Difference"), ` Gained orange, lost blue`);
  $("threshold-note").textContent =
    `Dotted lines are the ${Math.round(100 * data.quantile)}% quantiles of p and of H: each model's own, and the base's in the ` +
    `difference, whose bins are wider. Tokens under both, in the shaded corner, are confident conflicts: the model was sure of something else.`;
  drawHistograms(a, b, base, candidate, names, view.tokens);
}

function bold(text) {
  const node = document.createElement("b");
  node.textContent = `${text}.`;
  return node;
}

function drawHistograms(a, b, base, candidate, names, total) {
  const kinds = [
    ["p", P, (i) => Math.floor(i / H), [base.pq, candidate.pq]],
    ["h", H, (i) => i % H, [base.hq, candidate.hq]],
  ];
  for (const [id, bins, index, limits] of kinds) {
    const step = 2;
    const traces = [[a, names[0], css("--base"), 5, 0.4], [b, names[1], css("--candidate"), 1.6, 1]].map(
      ([counts, name, color, width, opacity]) => ({ type: "scatter", mode: "lines", name: plain(name), opacity,
        x: centres(bins / step), y: marginal(counts, bins / step, (i) => Math.floor(index(i) / step)).map((n) => n / total || null),
        line: { shape: "hvh", color, width }, hovertemplate: `%{x:.3f}: %{y:.3%} of tokens<extra>${plain(name)}</extra>` }));
    draw(`plot-${id}`, traces, {
      showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: css("--ink") } },
      margin: { l: 66, r: 10, t: 34, b: 44 }, hovermode: "x unified",
      xaxis: axis(id === "p" ? "p" : "H", { range: [0, 1], showgrid: false }),
      yaxis: axis("share of tokens", { type: "log", tickformat: "~%", dtick: 1 }),
      shapes: limits.map((x, i) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
        line: { color: css(i ? "--candidate" : "--base"), width: 1, dash: "dash" } })),
    }, `Distribution of ${id === "p" ? "p" : "H"} for ${names.join(" and ")}`);
  }
}

function drawPairs(view, base, candidate, names) {
  const [x, y] = [base, candidate].map((model) => unpack(model.sample).map((n) => n / 65535));
  draw("plot-pairs", [{ type: "scatter", mode: "markers", x, y,
    marker: { size: 4.5, color: css("--candidate"), opacity: 0.4 },
    hovertemplate: "before %{x:.3f}<br>after %{y:.3f}<extra></extra>" }], {
    xaxis: axis(`p, ${plain(names[0])}`, { range: [-0.02, 1.02] }),
    yaxis: axis(`p, ${plain(names[1])}`, { range: [-0.02, 1.02] }),
    shapes: [[0, 0, 1], [data.moved, 0, 1 - data.moved], [0, data.moved, 1 - data.moved]].map(([x0, y0, length], i) => ({ type: "line", x0,
      y0, x1: x0 + length, y1: y0 + length, line: { color: css("--muted"), width: 1, dash: i ? "dot" : "solid" } })),
  }, `p of ${x.length} tokens for ${names.join(" against ")}`);
  $("pairs-note").textContent =
    `Each dot is one scored token, its p before pruning across and after pruning up; ${x.length.toLocaleString("en")} of ` +
    `${view.tokens.toLocaleString("en")} were drawn, the same ones for every candidate. On the diagonal nothing changed. ` +
    `Of all tokens here, ${percent(candidate.moved / view.tokens)} moved by more than ${data.moved} (outside the dotted lines).`;
}

// ---- experts ---------------------------------------------------------------------------------
function drawExperts(label) {
  const index = data.expertsOf[label];
  $("experts").hidden = index === undefined;
  if (index === undefined) return;
  const map = data.experts[index];
  const [L, E] = map.shape;
  const [rank, count, kept, tied] = [map.rank, map.count, map.kept, map.tied].map(unpack);
  const byRank = pick("order") === "rank", kind = pick("value");
  const value = { rank: rank.map((r) => E - r), scaled: map.scaled, load: map.load }[kind];
  const grid = (of) => {
    const out = Array.from({ length: L }, () => new Array(E));
    for (let i = 0; i < L * E; i++) out[Math.floor(i / E)][byRank ? rank[i] : i % E] = of(i);
    return out;
  };
  const marks = (chosen) => {
    const cells = [...Array(L * E).keys()].filter(chosen);
    return { x: cells.map((i) => (byRank ? rank[i] : i % E)), y: cells.map((i) => Math.floor(i / E)) };
  };
  const rowHeight = Math.min(36, Math.max(L > 40 ? 12 : 19, 240 / L));
  const hover = (i) => `expert ${i % E}, ${kept[i] ? "kept" : "dropped"}${tied[i] ? ", in the tie zone" : ""}<br>` +
    `rank ${rank[i] + 1} of ${E}, score ${map.score[i]}<br>chosen ${count[i].toLocaleString("en")} times, load ${map.load[i]}`;
  const size = E > 64 ? 4 : 7;
  const colorbar = { thickness: 7, outlinewidth: 0, len: 1, tickfont: { color: css("--muted"), size: 11 },
    ...(kind === "rank" ? { tickvals: [E, 1], ticktext: ["first", "last"] } : {}) };
  $("plot-experts").style.height = `${L * rowHeight + 110}px`;
  draw("plot-experts", [
    { type: "heatmap", z: grid((i) => value[i]), text: grid(hover), colorscale: ramp(), colorbar, xgap: 1, ygap: 1,
      hovertemplate: "layer %{y}, %{text}<extra></extra>" },
    { type: "scatter", mode: "markers", name: "dropped", hoverinfo: "skip", showlegend: true, ...marks((i) => !kept[i]),
      marker: { symbol: "x-thin", size, line: { width: 1.75, color: css("--fail") } } },
    { type: "scatter", mode: "markers", name: "tie zone", hoverinfo: "skip", showlegend: true, ...marks((i) => tied[i]),
      marker: { symbol: "circle-open", size: size + 5, color: css("--candidate"), line: { width: 1.5 } } },
  ], {
    showlegend: true, margin: { l: 48, r: 10, t: 40, b: 48 },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: css("--ink") } },
    xaxis: axis(byRank ? "place in layer, best score first" : "expert id", { range: [-0.5, E - 0.5], showgrid: false }),
    yaxis: axis("layer", { range: [L - 0.5, -0.5], showgrid: false, dtick: L > 12 ? 4 : 1 }),
  }, `Experts of ${label}: ${kept.filter(Boolean).length} of ${L * E} kept`);
  const perLayer = kept.filter(Boolean).length / L;
  $("experts-note").textContent = `Each row is a layer, each cell an expert. Criterion ${map.criterion} keeps ` +
    `${Number.isInteger(perLayer) ? perLayer : `on average ${perLayer.toFixed(1)}`} of ${E} experts in each of ${L} layers; ` +
    `crosses mark the dropped, circles the tie zone.`;
}

// ---- selection: the address holds it, so a view can be linked ----------------------------------
const controls = { candidate: $("candidate"), pack: $("pack"), length: $("length") };
const options = (select, values) => {
  const before = select.value;
  select.replaceChildren(...values.map((v) => new Option(v, v)));
  select.value = values.includes(before) ? before : values[0];
};

function fill(wanted) {
  const has = (select, value) => [...select.options].some((o) => o.value === value);
  if (has(controls.candidate, wanted.candidate)) controls.candidate.value = wanted.candidate;
  options(controls.pack, [...new Set(data.views.map((v) => v.pack))]);
  if (has(controls.pack, wanted.pack)) controls.pack.value = wanted.pack;
  options(controls.length, data.views.filter((v) => v.pack === controls.pack.value).map((v) => String(v.seqLen)));
  if (has(controls.length, wanted.length)) controls.length.value = wanted.length;
}

function chosen() {
  return Object.fromEntries(Object.entries(controls).map(([name, select]) => [name, select.value]));
}

function show() {
  const { candidate: label, pack, length } = chosen();
  const view = data.views.find((v) => v.pack === pack && String(v.seqLen) === length);
  const names = [data.base, label];
  const model = view.candidates[data.candidates.indexOf(label)];
  for (const node of document.querySelectorAll("[data-candidate]")) node.hidden = node.dataset.candidate !== label;
  for (const row of document.querySelectorAll("[data-row]")) row.toggleAttribute("aria-current", row.dataset.row === label);
  $("showing").textContent = `${view.tokens.toLocaleString("en")} scored tokens`;
  drawPlanes(view, view.base, model, names);
  drawPairs(view, view.base, model, names);
  drawExperts(label);
}

function choose(wanted) {
  fill({ ...chosen(), ...wanted });
  history.replaceState(null, "", `#${new URLSearchParams(chosen())}`);
  show();
}

const fromAddress = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
for (const select of Object.values(controls)) select.addEventListener("change", () => choose({}));
for (const button of document.querySelectorAll("[data-pick]"))
  button.addEventListener("click", () => choose({ candidate: button.dataset.pick }));
for (const input of document.querySelectorAll("input[type=radio]"))
  input.addEventListener("change", () => drawExperts(controls.candidate.value));
addEventListener("hashchange", () => { if (location.hash.includes("=")) choose(fromAddress()); });

$("theme").addEventListener("click", () => { reportTheme.next(); show(); });
reportTheme.system.addEventListener("change", () => { reportTheme.paint(); show(); });

addEventListener("beforeprint", () => { reportTheme.paint("light"); show(); }); // paper is white
addEventListener("afterprint", () => { reportTheme.paint(); show(); });

reportTheme.paint();
choose(fromAddress());
})();
