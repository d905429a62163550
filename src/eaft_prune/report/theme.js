"use strict";
// Runs in the head, so that the page never flashes in the other theme.
const reportTheme = (() => {
const system = matchMedia("(prefers-color-scheme: dark)");
const successor = { auto: "light", light: "dark", dark: "auto" };
let theme = "auto";
try { theme = localStorage.getItem("report-theme") || theme; } catch { /* files may be denied storage */ }
if (!(theme in successor)) theme = "auto";

function paint(shown = theme) {
  document.documentElement.dataset.theme = shown === "auto" ? (system.matches ? "dark" : "light") : shown;
  const button = document.getElementById("theme");
  if (button) button.textContent = `Theme: ${theme}`;
}

function next() {
  theme = successor[theme];
  try { localStorage.setItem("report-theme", theme); } catch { /* as above */ }
  paint();
}

paint();
return { system, paint, next };
})();
