// Draws every plot of a finished page again as a picture of its own, with title and legend.
async ({ format, scale }) => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const [WIDTH, WIDE, LINE, FONT] = [720, 1080, 22, 15];

  let drawn = 1;  // plotly makes up names by chance: the same page gives the same files
  Math.random = () => (drawn = (drawn * 16807) % 2147483647) / 2147483647;

  function colourOf(look) {
    const probe = document.createElement("span");
    probe.className = look;
    document.body.append(probe);
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  }

  // A trace without a point, for its entry in the legend.
  function entry([name, look, symbol]) {
    const color = colourOf(look);
    const drawn = symbol
      ? { mode: "markers", marker: { symbol, size: 11, color, line: { width: symbol.endsWith("-open") ? 2 : 0, color } } }
      : { mode: "lines", line: { color, width: 3 } };
    return { type: "scatter", x: [null], y: [null], name, showlegend: true, hoverinfo: "skip", ...drawn };
  }

  // What has a size of its own grows with the rest.
  function grown(value) {
    for (const [key, inner] of Object.entries(value || {})) {
      if (/^(font|tickfont)$/.test(key) && inner.size) inner.size *= FONT / 12;
      else if (typeof inner === "object") grown(inner);
    }
    return value;
  }

  function picture(plot) {
    const { title, legend } = specs[plot.dataset.spec].key;
    const width = plot.clientWidth > WIDTH ? WIDE : WIDTH;
    const top = 22 + LINE * title.split("<br>").length;
    const entries = legend.map(entry);
    const layout = grown(JSON.parse(JSON.stringify(plot.layout)));
    const ink = colourOf("");
    const longest = Math.max(0, ...entries.map(({ name }) => name.length));
    const columns = Math.max(1, Math.floor((width - 100) / (56 + 0.55 * FONT * longest)));
    const below = entries.length ? 30 + LINE * Math.ceil(entries.length / columns) : 0;
    const height = Number(plot.dataset.height) + top + below;
    return {
      data: [...plot.data.map((trace) => ({ ...trace, showlegend: false })), ...entries],
      layout: {
        ...layout, width, height, autosize: false, showlegend: entries.length > 0,
        paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff",
        font: { ...layout.font, size: FONT, color: ink },
        margin: { ...layout.margin, l: 74, r: Math.max(24, 1.3 * (layout.margin.r || 0)), t: top, b: 58 },
        title: { text: title, x: 0, xanchor: "left", xref: "paper", y: 1, yanchor: "top", yref: "container",
          pad: { t: 14 }, font: { size: FONT + 2, color: ink } },
        legend: { orientation: "h", traceorder: "normal", x: 0, xanchor: "left", xref: "paper", y: 0, yanchor: "bottom", yref: "container",
          font: { size: FONT - 1, color: ink } },
      },
    };
  }

  const pictures = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const drawing = picture(plot);
    const figure = plot.closest("figure");
    const [, name, i] = /^(.*)-(\d+)$/.exec(plot.dataset.spec);
    const isOnly = figure.querySelectorAll(".plot").length === 1;
    const url = await Plotly.toImage(drawing,
      { format, scale: format === "png" ? scale : 1, width: drawing.layout.width, height: drawing.layout.height });
    pictures.push({
      name: isOnly ? name : name + "-" + (Number(i) + 1),
      finding: figure.querySelector("figcaption").textContent,
      url,
    });
  }
  return pictures;
}
