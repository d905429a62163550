"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const node = document.getElementById("plot");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Plotly reads a little HTML in its texts: names from outside must not be part of it.
const plain = (label) => label.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const dashes = ["solid", "dash", "dot", "dashdot"];

const colour = (status) => css({ PASS: "--pass", FAIL: "--fail" }[status] ?? "--near");

function axis(title, more) {
  return { title: { text: title, standoff: 6 }, color: css("--muted"), gridcolor: css("--rule"),
    linecolor: css("--rule"), zeroline: false, ticks: "outside", tickcolor: css("--rule"), ...more };
}

function trace(line, index) {
  const square = line.proof ? "square" : "circle";
  return {
    x: line.gb, y: line.growth, name: plain(line.name), mode: line.proof ? "markers" : "lines+markers",
    line: { color: css("--base"), width: 1.5, dash: dashes[index % dashes.length] },
    marker: { size: line.proof ? 13 : 10, symbol: line.status.map((s) => (s === "PASS" ? square : `${square}-open`)),
      color: line.status.map(colour), line: { width: 2, color: line.status.map(colour) } },
    error_y: { type: "data", symmetric: false, color: css("--muted"), thickness: 1.2, width: 5,
      array: line.high.map((high, i) => high - line.growth[i]),
      arrayminus: line.low.map((low, i) => line.growth[i] - low) },
    text: line.gb.map((gb, i) => `${plain(line.name)}<br>${line.keep[i] ?? "?"} of ${data.experts} experts, `
      + `${gb.toPrecision(4)} GB<br>${line.status[i]}, PPL ${line.growth[i].toFixed(2)}%`),
    hovertemplate: "%{text}<extra></extra>",
  };
}

function draw() {
  const sizes = data.lines.flatMap((line) => line.gb.map((gb, i) => [gb, line.keep[i]]));
  const named = new Map(sizes.filter(([, keep]) => keep !== null));
  named.set(data.base, data.experts);
  const span = [Math.min(...sizes.map(([gb]) => gb)), data.base];
  const pad = 0.06 * (span[1] - span[0] || span[1]);
  const range = [span[0] - pad, span[1] + pad];
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", "Size in GB and experts against the change of perplexity, a line a method");
  const above = { x: [data.base], y: [0], xaxis: "x2", mode: "markers", marker: { opacity: 0 }, showlegend: false,
    hoverinfo: "skip" };
  Plotly.react(node, [...data.lines.map(trace), above], {
    margin: { l: 56, r: 10, t: 44, b: 48 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 12, color: css("--ink") }, hovermode: "closest",
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--muted"), font: { color: css("--ink") } },
    legend: { orientation: "h", y: -0.16 },
    xaxis: axis("size, GB", { range }),
    // drawn for the sake of `above`, as an axis without a trace is not
    xaxis2: axis("experts a layer", { range, overlaying: "x", side: "top", gridcolor: "rgba(0,0,0,0)",
      tickvals: [...named.keys()], ticktext: [...named.values()].map(String) }),
    yaxis: axis("Δ PPL / PPL, %", { ticksuffix: "%", rangemode: "tozero" }),
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.limit, y1: data.limit,
      line: { color: css("--ink"), dash: "dash", width: 1.2 } }],
    annotations: [{ xref: "paper", x: 1, y: data.limit, text: `limit ${data.limit}%`, showarrow: false,
      xanchor: "right", yanchor: "bottom", font: { color: css("--muted") } }],
  }, { displayModeBar: false, responsive: true });
}

draw();
document.getElementById("theme").addEventListener("click", () => { reportTheme.next(); draw(); });
reportTheme.paint();
reportTheme.system.addEventListener("change", () => { reportTheme.paint(); draw(); });
})();
