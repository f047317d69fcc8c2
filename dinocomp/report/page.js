"use strict";
(() => {
  const data = JSON.parse(document.getElementById("sheet").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColour = (i) => colour(`--c${i % 8}`);
  const dash = (i) => ["solid", "dash", "dot", "dashdot"][Math.floor(i / 8) % 4];
  const plots = [];
  let following = false; // one chart's zoom is being given to the others

  // Exponential mean over about a thirtieth of the curve, which starts without a bias towards 0.
  function smoothed(values) {
    const keep = Math.exp(-30 / Math.max(values.length, 31));
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  function faint(hex) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},0.16)`;
  }

  function traces(plot) {
    const { chart, smooth } = plot;
    const found = [];
    for (const curve of chart.curves) {
      const x = data.x[curve.x], line = curve.baseline ? colour("--soft") : seriesColour(curve.colour);
      if (curve.baseline) {
        const level = { width: 2, color: line, dash: "dash" };
        found.push({ x, y: curve.y, type: "scatter", mode: "lines", name: curve.name, line: level, hovertemplate: chart.percent ? "%{y:.1%}" : "%{y:.4~g}" });
        continue;
      }
      if (curve.low && !smooth && chart.curves.length <= 6) {
        const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: curve.name };
        found.push({ ...edge, y: curve.low }, { ...edge, y: curve.high, fill: "tonexty", fillcolor: faint(line) });
      }
      const few = x.length < 60 && chart.rare;
      const shape = {
        x, type: "scatter", name: curve.name, legendgroup: curve.name, line: { width: 2, color: line, dash: dash(curve.colour) },
        mode: few || x.length === 1 ? "lines+markers" : "lines", marker: { size: 7 }, connectgaps: false,
        hovertemplate: chart.percent ? "%{y:.1%}" : "%{y:.4~g}",
      };
      if (smooth) found.push({ ...shape, y: curve.y, opacity: 0.25, showlegend: false, hoverinfo: "skip", hovertemplate: null });
      found.push({ ...shape, y: smooth ? smoothed(curve.y) : curve.y });
    }
    return found;
  }

  function layout(plot) {
    const ink = colour("--ink"), grid = colour("--grid"), soft = colour("--soft"), card = colour("--card");
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 12, color: soft }, automargin: true };
    return {
      paper_bgcolor: card, plot_bgcolor: card, font: { color: ink, size: 13, family: "inherit" },
      margin: { l: 44, r: 10, t: coarse.matches ? 8 : 26, b: 34 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink }, hovermode: "x unified", dragmode: plot.zoom || !coarse.matches ? "zoom" : false,
      showlegend: plot.chart.curves.length > 1,
      legend: { orientation: "h", x: 0, xref: "container", yref: "container", y: 0, yanchor: "bottom", font: { size: 12 }, itemsizing: "constant" },
      hoverlabel: { bgcolor: card, bordercolor: colour("--line"), font: { color: ink, size: 12 } },
      xaxis: { ...axis, type: plot.logX ? "log" : "linear", range: plot.range, autorange: !plot.range, hoverformat: ",d", tickformat: plot.logX ? "" : "~s", nticks: 7, title: { text: "iteration", font: { size: 12, color: soft }, standoff: 4 } },
      yaxis: { ...axis, type: plot.logY ? "log" : "linear", nticks: 6, dtick: plot.logY ? logTicks(plot) : null, tickformat: plot.chart.percent ? ".1~%" : "~g", rangemode: plot.logY || varies(plot) ? "normal" : "tozero" },
    };
  }

  // Of a constant, an axis from 0 on is drawn: around one, it would reach from 1 below to 1 above.
  const varies = (plot) => new Set(plot.chart.curves.flatMap((curve) => curve.y).filter((value) => value !== null)).size > 1;

  function decades(plot) {
    const values = plot.chart.curves.flatMap((curve) => curve.y).filter((value) => value > 0);
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    return values.length ? Math.log10(high / low) : 0;
  }

  // Powers of ten; or 1, 2, 5 of each; or as plotly likes, where less than a decade is seen.
  const logTicks = (plot) => (decades(plot) > 2 ? 1 : decades(plot) > 0.6 ? "D2" : null);

  const config = {
    responsive: true, displaylogo: false, displayModeBar: coarse.matches ? false : "hover",
    modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]], doubleClick: "reset+autosize", scrollZoom: false,
  };
  const draw = (plot) => Plotly.react(plot.div, traces(plot), layout(plot), config);

  // A zoom along iterations is for all charts: what else happened there?
  function follow(plot, event) {
    if (following) return;
    let range;
    if (event["xaxis.autorange"]) range = null;
    else if ("xaxis.range[0]" in event) range = [event["xaxis.range[0]"], event["xaxis.range[1]"]];
    else if (event["xaxis.range"]) range = event["xaxis.range"];
    else return;
    const linear = range && plot.logX ? range.map((value) => 10 ** value) : range;
    following = true;
    const others = plots.map((other) => {
      if (!linear) other.range = null;
      else other.range = other.logX ? linear.map((value) => Math.log10(Math.max(value, 0.5))) : linear;
      if (other === plot) return null;
      return Plotly.relayout(other.div, other.range ? { "xaxis.range": [...other.range] } : { "xaxis.autorange": true, "yaxis.autorange": true });
    });
    Promise.all(others).finally(() => { following = false; });
  }

  for (const div of document.querySelectorAll("[data-chart]")) {
    const chart = data.charts[div.dataset.chart];
    if (!chart) continue;
    const plot = { div, chart, logX: false, logY: chart.log, smooth: false, zoom: false, range: null };
    plots.push(plot);
    for (const button of div.parentElement.querySelectorAll("button[data-do]")) {
      const key = { x: "logX", y: "logY", smooth: "smooth", zoom: "zoom" }[button.dataset.do];
      button.setAttribute("aria-pressed", plot[key]);
      button.addEventListener("click", () => {
        plot[key] = !plot[key];
        if (key === "logX" || key === "zoom") plot.range = null;
        button.setAttribute("aria-pressed", plot[key]);
        draw(plot);
        if (key === "zoom" && !plot.zoom) Plotly.relayout(div, { "xaxis.autorange": true, "yaxis.autorange": true });
      });
    }
    Plotly.newPlot(div, traces(plot), layout(plot), config).then(() => div.on("plotly_relayout", (event) => follow(plot, event)));
  }
  dark.addEventListener("change", () => plots.forEach(draw));
  coarse.addEventListener("change", () => plots.forEach(draw));

  // Pictures over time: one is seen, the slider chooses. Without this script all are there, one below the other.
  for (const figure of document.querySelectorAll("[data-slider]")) {
    const images = [...figure.querySelectorAll("img")], row = figure.querySelector(".slider");
    const input = row.querySelector("input"), output = row.querySelector("output");
    const show = () => {
      images.forEach((image, i) => { image.hidden = i !== Number(input.value); });
      const iteration = images[input.value].dataset.iteration;
      output.textContent = `iteration ${Number(iteration).toLocaleString("en")}`;
      input.setAttribute("aria-valuetext", output.textContent);
    };
    row.hidden = images.length < 2;
    input.value = images.length - 1;
    input.addEventListener("input", show);
    show();
  }

  for (const time of document.querySelectorAll("time[datetime]")) {
    const when = new Date(time.dateTime);
    if (!Number.isNaN(when.getTime())) time.textContent = when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  }

  // Of a run that says it is running, only its files tell; a killed one says so for ever.
  const news = document.querySelector("[data-updated]");
  if (news) {
    const quiet = (Date.now() - new Date(news.dataset.updated)) / 1000;
    if (quiet > Number(news.dataset.patience)) {
      const hours = quiet / 3600;
      const since = hours < 1 ? `${Math.round(quiet / 60)} min` : hours < 48 ? `${hours.toFixed(1)} h` : `${Math.round(hours / 24)} days`;
      news.textContent = `No news for ${since}: the run may have been killed. The same command goes on from its last checkpoint.`;
      news.classList.add("level", "watch");
    }
    const box = document.getElementById("refresh");
    let timer;
    const set = () => {
      clearInterval(timer);
      if (box.checked) timer = setInterval(() => location.reload(), 60000);
      try { sessionStorage.setItem("refresh", box.checked ? "1" : ""); } catch { /* not where storage is off */ }
    };
    try { box.checked = sessionStorage.getItem("refresh") === "1"; } catch { /* the same */ }
    box.addEventListener("change", set);
    set();
  }
})();
