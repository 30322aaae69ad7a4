// Curves of the runs, drawn by plotly.js when they come into view. Library and data are compressed in the page.
(async () => {
  "use strict";
  const home = document.querySelector("#curves");
  if (!home) return;
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const status = home.querySelector(".status");
  let data;
  try {
    data = JSON.parse(await unpack("curves-data"));
    const code = await unpack("curves-library");
    // The styles of maps would be refused, and no plot here needs them: let the library find them in place.
    for (const [, id] of code.matchAll(/getElementById\("([0-9a-f]{64})"\)/g)) {
      const mark = document.createElement("meta");
      mark.id = id;
      document.head.append(mark);
    }
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    if (!window.Plotly) throw new Error("the library did not start");
  } catch (error) {
    status.textContent = `This browser cannot draw the curves (${error.message}); tables, figures and samples are complete.`;
    return;
  }
  status.hidden = true;

  const boxes = Object.fromEntries([...home.querySelectorAll(".legend input")].map((box) => [box.value, box]));
  const shown = (row) => boxes[row].checked;
  const escaped = (text) => text.replace(/[&<>]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[letter]);
  const traces = (panel) => panel.lines.map(([row, name, steps, values, mean]) => ({
    x: data.steps[steps],
    y: values,
    mode: values.length === 1 ? "markers" : "lines",
    line: { color: data.rows[row].color, dash: data.rows[row].dash, width: mean ? 2.4 : panel.spread ? 0.8 : 1.6 },
    marker: { color: data.rows[row].color },
    opacity: mean || !panel.spread ? 1 : 0.4,
    hoverinfo: "x+y+text",
    text: escaped(`${data.rows[row].label}, ${name}`),
    visible: shown(row),
    meta: row,
  }));
  const draw = (box) => {
    if (box.drawn) return;
    box.drawn = true;
    const panel = data.panels[Number(box.dataset.panel)];
    Plotly.newPlot(box, traces(panel), {
      width: box.clientWidth,
      height: box.clientHeight,
      margin: { l: 48, r: 12, t: 30, b: 36 },
      title: { text: escaped(panel.name), font: { size: 13 }, x: 0.03, xanchor: "left", y: 0.965, yanchor: "top" },
      font: { family: "system-ui, sans-serif", size: 11, color: "#1d2126" },
      xaxis: { title: { text: "step", standoff: 4 }, zeroline: false, nticks: 6 },
      yaxis: { zeroline: true, zerolinecolor: "#c8ccd2", nticks: 6, exponentformat: "e" },
      showlegend: false,
      hovermode: "closest",
      paper_bgcolor: "#fff",
      plot_bgcolor: "#fff",
    }, { displayModeBar: false, showTips: false });
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "larger";
    button.addEventListener("click", () => {
      const large = box.classList.toggle("large");
      button.textContent = large ? "smaller" : "larger";
      Plotly.relayout(box, { width: box.clientWidth, height: box.clientHeight });
    });
    box.append(button);
  };
  const open = () => [...home.querySelectorAll("details[open] .panel")];
  const seen = new IntersectionObserver((found) => {
    for (const { isIntersecting, target } of found) if (isIntersecting) draw(target);
  }, { rootMargin: "600px" });
  for (const box of home.querySelectorAll(".panel")) seen.observe(box);
  const rest = window.requestIdleCallback || ((task) => setTimeout(task, 200));
  const next = () => {
    const box = open().find((one) => !one.drawn);
    if (box) {
      draw(box);
      rest(next);
    }
  };
  rest(next);
  const small = () => {
    for (const button of home.querySelectorAll(".panel.large button")) button.click();
  };
  addEventListener("beforeprint", () => {
    small();
    open().forEach(draw);
  });
  home.querySelector(".legend").addEventListener("input", () => {
    for (const box of home.querySelectorAll(".panel")) {
      if (box.drawn) Plotly.restyle(box, { visible: box.data.map((trace) => shown(trace.meta)) });
    }
  });
  home.dataset.ready = "yes";
})();
