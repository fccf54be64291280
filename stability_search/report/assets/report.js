"use strict";
// Draws the figures in the colours of the style sheet, and again when those change; sorts the
// tables of trials; fills the drawer of a trial; adds the copy buttons. Text reaches the page by
// textContent only.
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const curves = JSON.parse(document.getElementById("curves").textContent);
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

  // A whole axis "@3:scale" of a trace stands for the column `scale` of the fourth curve.
  function columned(trace) {
    const filled = { ...trace };
    for (const axis of ["x", "y"]) {
      const named = typeof trace[axis] === "string" && /^@(\d+):([a-z_]+)$/.exec(trace[axis]);
      if (named) filled[axis] = curves[named[1]][named[2]];
    }
    return filled;
  }

  const trials = JSON.parse(document.getElementById("trials").textContent);
  const drawer = document.getElementById("drawer");
  const inDrawer = (name) => document.getElementById("drawer-" + name);

  function element(name, text) {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  }

  function fillPairs(list, pairs) {
    list.replaceChildren(...pairs.map(([name, text]) => {
      const pair = document.createElement("div");
      pair.append(element("dt", name), element("dd", text));
      return pair;
    }));
  }

  // The curves of the trial in the drawer, its bad steps on a rail above each; steps whose batch
  // was at fault stand there in grey.
  function drawCurves(style) {
    const held = trials.trials[drawer.dataset.trial];
    const plots = inDrawer("plots");
    plots.replaceChildren();
    if (!held) return;
    const curve = curves[held.curve];
    const labelled = (isBad) => held.steps
      .filter(([, label]) => (trials.words[label] === "bad") === isBad).map(([step]) => step);
    const rail = (steps, color) => (
      { type: "scatter", mode: "markers", x: steps, y: steps.map(() => 0), yaxis: "y2", hoverinfo: "x",
        marker: { symbol: "line-ns-open", size: 8, color, line: { width: 1.4, color } } });
    const isShort = curve.step.length <= 60; // single numbers between gaps would be no line
    for (const panel of trials.panels) {
      const values = curve[panel.name];
      if (!values) continue;
      const yaxis = { ...panel.layout.yaxis, ...held.axes[panel.name] };
      const data = [
        { type: "scatter", mode: isShort ? "lines+markers" : "lines", x: curve.step, y: values, hoverinfo: "x+y",
          marker: { size: 5, color: "@" + held.color },
          line: { color: "@" + held.color, width: 1.6, shape: panel.name === "scale" ? "hv" : "linear" } },
        rail(labelled(false), "@muted"),
        rail(labelled(true), "@stop"),
      ];
      const plot = document.createElement("div");
      plot.className = "curve";
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", panel.title + " of " + curve.step.length + " steps");
      plots.append(element("h3", panel.title), plot);
      Plotly.react(plot, coloured(data, "", style), coloured({ ...panel.layout, yaxis }, "", style),
        { displayModeBar: false, responsive: true });
    }
  }

  function openTrial(key, cells) {
    const [id, attempt] = [key.slice(0, key.lastIndexOf("#")), Number(key.slice(key.lastIndexOf("#") + 1))];
    const held = trials.trials[key];
    const facts = trials.columns.map((name, i) => [name, (held ? held.facts : cells)[i]]);
    const known = Object.fromEntries(facts);
    const file = trials.run + "/steps/" + id + (attempt > 1 ? "-attempt" + attempt : "") + ".parquet";
    drawer.dataset.trial = key;
    inDrawer("title").textContent = id;
    inDrawer("end").textContent = [known.outcome, known.reason].filter(Boolean).join(": ");
    inDrawer("note").textContent = !held ? "The page does not hold the steps of this trial: they are in " + file + "."
      : held.num_steps > curves[held.curve].step.length
        ? "Of " + held.num_steps + " steps, every k-th and every bad one is drawn." : "";
    const steps = held ? held.steps : [];
    inDrawer("none").textContent = steps.length ? "" : held ? "It had none." : known.num_bad_steps + " of them.";
    inDrawer("steps").hidden = !steps.length;
    inDrawer("steps").querySelector("tbody").replaceChildren(...steps.map((step) => {
      const row = document.createElement("tr");
      const [at, label, reason, module, phase, largest, batch, evidence] = step;
      const texts = [at, ...[label, reason, module, phase, largest].map((i) => trials.words[i]),
        batch === null ? "" : batch, trials.words[evidence]];
      row.append(...texts.map((text) => element("td", String(text))));
      return row;
    }));
    fillPairs(inDrawer("facts"), facts.filter(([, text]) => text !== ""));
    fillPairs(inDrawer("files"), [["steps", file], ["log", trials.run + "/run.log"]]);
    const blanks = { run: trials.run, trial: id, attempt, device: trials.device };
    inDrawer("command").textContent = trials.repeat.replace(
      /\{(run|trial|attempt|device)\}/g, (_, name) => JSON.stringify(blanks[name]));
    drawer.showModal();
    drawCurves(getComputedStyle(root));
    drawer.querySelector(".inside").scrollTop = 0;
  }

  let round = 0; // of drawing: a newer one ends an older one

  function drawOne(plot, style) {
    const spec = coloured(specs[plot.dataset.spec], "", style);
    const layout = { ...spec.layout, height: Number(plot.dataset.height), autosize: true };
    Plotly.react(plot, spec.data.map(columned), layout, { displayModeBar: false, responsive: true });
  }

  function endRound(style) {
    if (drawer.open) drawCurves(style);
    root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
  }

  // All at once: print does not wait.
  function draw() {
    round += 1;
    const style = getComputedStyle(root);
    for (const plot of plots) drawOne(plot, style);
    endRound(style);
  }

  // A few at a time, so that the page can be read, scrolled and clicked meanwhile.
  function drawByTurns() {
    const own = ++round;
    const style = getComputedStyle(root);
    const left = [...plots];
    function turn() {
      if (own !== round) return;
      const until = performance.now() + 40;
      while (left.length && performance.now() < until) drawOne(left.shift(), style);
      if (left.length) setTimeout(turn); else endRound(style);
    }
    turn();
  }

  function beginPrint() {
    root.dataset.print = "";
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.dataset.group = details.name;
      details.name = ""; // a group would close its others
      details.open = true;
      details.dataset.opened = "";
    }
    draw();
  }

  function endPrint() {
    delete root.dataset.print;
    for (const details of document.querySelectorAll("details[data-opened]")) {
      details.open = false;
      details.name = details.dataset.group;
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

  const all = document.getElementById("all-trials");
  for (const row of all ? all.tBodies[0].rows : []) {
    const attempt = row.cells[trials.columns.indexOf("attempt")].textContent;
    const button = element("button", row.cells[0].textContent);
    button.type = "button";
    button.className = "opens";
    button.dataset.trial = button.textContent + "#" + attempt;
    row.cells[0].replaceChildren(button);
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.opens");
    if (button) openTrial(button.dataset.trial, [...button.closest("tr").cells].map((td) => td.textContent));
    else if (event.target === drawer || event.target.id === "drawer-close") drawer.close();
  });

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

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawByTurns);
  addEventListener("beforeprint", beginPrint);
  addEventListener("afterprint", endPrint);
  for (const plot of plots) plot.style.height = plot.dataset.height + "px";
  drawByTurns();
})();
