"use strict";
// Draws the figures in the colours of the style sheet, and again when those change; sorts the
// table of trials; adds the copy buttons. Text reaches the page by textContent only.
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];

  // "@name" under a key that holds a colour stands for the style sheet's --name.
  function coloured(value, key, style) {
    if (typeof value === "string") {
      const named = /color$/i.test(key) && /^@[a-z0-9_-]+$/.test(value);
      return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    }
    if (Array.isArray(value)) {
      const inner = key === "colorscale" ? "color" : key;
      return value.map((item) => coloured(item, inner, style));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([name, item]) => [name, coloured(item, name, style)]));
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(root);
    for (const plot of plots) {
      const spec = coloured(specs[plot.dataset.spec], "", style);
      plot.style.height = plot.dataset.height + "px";
      const layout = { ...spec.layout, height: Number(plot.dataset.height), autosize: true };
      Plotly.react(plot, spec.data, layout, { displayModeBar: false, responsive: true });
    }
    root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
  }

  function beginPrint() {
    root.dataset.print = "";
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.removeAttribute("name"); // a group would close its others
      details.open = true;
      details.dataset.opened = "";
    }
    draw();
  }

  function endPrint() {
    delete root.dataset.print;
    for (const details of document.querySelectorAll("details[data-opened]")) {
      details.open = false;
      delete details.dataset.opened;
    }
    draw();
  }

  function compare(a, b) {
    if (a === "" || b === "") return (a === "") - (b === ""); // nothing stands last
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  }

  function sortBy(heading) {
    const row = heading.parentElement;
    const column = [...row.cells].indexOf(heading);
    const isRising = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of row.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", isRising ? "ascending" : "descending");
    const body = row.closest("table").tBodies[0];
    const keyed = [...body.rows].map((tr) => {
      const cell = tr.cells[column];
      return [cell.dataset.key ?? cell.textContent, tr];
    });
    keyed.sort(([a], [b]) => (isRising || a === "" || b === "" ? compare(a, b) : compare(b, a)));
    body.append(...keyed.map(([, tr]) => tr));
  }

  for (const heading of document.querySelectorAll(".sortable thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => sortBy(heading));
  }

  for (const box of document.querySelectorAll(".copyable")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const text = box.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(box.querySelector("code"));
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
    box.append(button);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", beginPrint);
  addEventListener("afterprint", endPrint);
  draw();
})();
