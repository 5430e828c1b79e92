/** Charts of one pixel: series, forecast, class probabilities, attribution, recurrence plots. */

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [360, 170, 28, 18, 8];
const DAY = 86_400_000;
const YEAR = 365.25 * DAY;
export const INDICES = ["NDVI", "EVI", "SAVI"];

/**
 * NDVI, EVI and SAVI by date. Dates that are not clear are marked below. A forecast is drawn with
 * its prediction interval and with the NDVI of the year before.
 *
 * @param {{dates: string[], clear: number[], NDVI: (number|null)[], EVI: object, SAVI: object}} measured
 * @param {{dates: string[], NDVI: {q10: number[], q50: number[], q90: number[]}} | null} forecast
 */
export function seriesChart(measured, forecast) {
  const times = measured.dates.map((date) => Date.parse(date));
  const later = forecast ? forecast.dates.map((date) => Date.parse(date)) : [];
  const from = Math.min(...times);
  const to = Math.max(...times, ...later);
  const x = (time) => LEFT + ((WIDTH - LEFT - 6) * (time - from)) / (to - from || 1);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.min(1, Math.max(-0.2, value)) + 0.2) / 1.2);
  const chart = element("svg", {
    class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `NDVI, EVI and SAVI on ${times.length} dates from ${measured.dates[0]} to ${measured.dates.at(-1)}`,
  });
  for (const value of [0, 0.5, 1]) {
    chart.append(element("path", { class: "axis", d: `M${LEFT} ${y(value)}H${WIDTH - 6}` }));
    chart.append(text(LEFT - 4, y(value) + 3, String(value), "end"));
  }
  chart.append(text(LEFT, HEIGHT - 4, measured.dates[0], "start"));
  chart.append(text(WIDTH - 6, HEIGHT - 4, (forecast?.dates ?? measured.dates).at(-1), "end"));
  if (forecast) {
    const upper = later.map((time, at) => `${x(time)} ${y(forecast.NDVI.q90[at])}`);
    const lower = later.map((time, at) => `${x(time)} ${y(forecast.NDVI.q10[at])}`).reverse();
    chart.append(element("path", { class: "band", d: `M${[...upper, ...lower].join("L")}Z` }));
    // The same days of the year before.
    const before = times.map((time, at) => [time + YEAR, measured.NDVI[at]])
      .filter(([time, value]) => value !== null && time >= later[0] - 15 * DAY && time <= later.at(-1) + 15 * DAY);
    chart.append(line("ndvi last", before.map(([time, value]) => [x(time), y(value)])));
    chart.append(line("ndvi", later.map((time, at) => [x(time), y(forecast.NDVI.q50[at])])));
  }
  for (const index of INDICES) {
    const there = times.map((time, at) => [time, measured[index][at]]).filter(([, value]) => value !== null);
    chart.append(line(index.toLowerCase(), there.map(([time, value]) => [x(time), y(value)])));
  }
  times.forEach((time, at) => {
    if (measured.clear[at] > 0) return;
    const mark = element("path", { class: "cloudy", d: `M${x(time) - 2} ${y(-0.2) - 4}l4 4m0 -4l-4 4` });
    mark.append(titled(`${measured.dates[at]}: not clear`));
    chart.append(mark);
  });
  return chart;
}

/** The legend of a series chart. */
export function seriesKey(forecast) {
  const key = document.createElement("p");
  key.className = "hint";
  key.textContent = `Green: NDVI; orange: EVI; blue: SAVI; ×: dates that are not clear${
    forecast ? "; shaded: 80 % prediction interval of the NDVI forecast; dashed: NDVI of the year before" : ""}.`;
  return key;
}

/**
 * How good forecasts from earlier dates were, beside the last value and last year's date.
 *
 * @param {object} backtest as in a response of `/forecast`
 * @param {string} subject whose past was forecast
 */
export function backtestTable(backtest, subject) {
  const years = backtest.where_last_year;
  const table = document.createElement("table");
  table.className = "backtest";
  table.innerHTML = "<thead><tr><th scope=col>Forecast from earlier dates<th scope=col class=number>RMSE</thead>";
  if (years) table.tHead.rows[0].insertAdjacentHTML("beforeend", "<th scope=col class=number>RMSE, last year known");
  const body = table.createTBody();
  const methods = [["forecast", "This forecast"], ["persistence", "Last value"], ["last_year", "Last year’s date"]];
  for (const [name, label] of methods) {
    if (name === "last_year" && !years) continue;
    const row = body.insertRow();
    row.insertCell().textContent = label;
    for (const errors of years ? [backtest, years] : [backtest]) {
      const cell = row.insertCell();
      cell.className = "number";
      // Last year's date is scored only where it is known.
      cell.textContent = errors === backtest && name === "last_year" ? "" : errors.rmse[name].toFixed(3);
    }
  }
  const note = document.createElement("figcaption");
  note.className = "hint";
  note.textContent = `Backtest on the past of ${subject}, ${backtest.first} to ${backtest.last}: `
    + `${backtest.pixel_dates} values from ${backtest.forecasts} forecasts. `
    + `The ${Math.round(100 * backtest.level)} % prediction interval contains ${Math.round(100 * backtest.coverage)} % of them.`;
  const figure = document.createElement("figure");
  figure.append(table, note);
  return figure;
}

/** A table of class probabilities, the largest first. */
export function probabilityTable(probabilities) {
  const table = document.createElement("table");
  table.innerHTML = "<thead><tr><th scope=col>Class<th scope=col class=number>Probability</thead>";
  const body = table.createTBody();
  const sorted = Object.entries(probabilities).sort(([, a], [, b]) => b - a).slice(0, 8);
  for (const [name, value] of sorted) {
    const row = body.insertRow();
    row.insertCell().textContent = name;
    const cell = row.insertCell();
    cell.className = "number";
    cell.textContent = `${(100 * value).toFixed(1)} %`;
  }
  return table;
}

/**
 * How much each date mattered to a class: bars up for dates that raise its probability, down for
 * dates that lower it.
 *
 * @param {Record<string, number | null>} attribution by ISO date
 * @param {string} name of the class
 */
export function attributionChart(attribution, name) {
  const dates = Object.keys(attribution);
  const values = dates.map((date) => attribution[date] ?? 0);
  const most = Math.max(...values.map(Math.abs), 1e-9);
  const strongest = dates[values.map(Math.abs).indexOf(most)] ?? dates[0];
  const [width, middle, reach] = [WIDTH - LEFT - 6, 40, 30];
  const chart = element("svg", {
    class: "chart attribution", viewBox: `0 0 ${WIDTH} 92`, role: "img",
    "aria-label": `How much each date mattered to ${name}; largest effect: ${strongest}`,
  });
  chart.append(element("path", { class: "axis", d: `M${LEFT} ${middle}H${WIDTH - 6}` }));
  dates.forEach((date, at) => {
    const height = (reach * values[at]) / most;
    const bar = element("rect", {
      class: height < 0 ? "against" : "for", width: Math.max(1, width / dates.length - 2),
      height: Math.abs(height), x: LEFT + (width * at) / dates.length, y: middle - Math.max(0, height),
    });
    bar.append(titled(`${date}: ${(100 * values[at]).toFixed(1)} percentage points of probability`));
    chart.append(bar);
  });
  chart.append(text(LEFT, 88, dates[0], "start"), text(WIDTH - 6, 88, dates.at(-1), "end"));
  const caption = document.createElement("figcaption");
  caption.className = "hint";
  caption.textContent = `Dates that raise the probability of ${name} (up) or lower it (down); largest effect: ${strongest}.`;
  const figure = document.createElement("figure");
  figure.append(chart, caption);
  return figure;
}

/** The recurrence plots of a pixel (M x M, M steps of the time grid), as the model's encoder sees them. */
export function plotFigures(plots) {
  const row = document.createElement("div");
  row.className = "plots";
  for (const index of INDICES) {
    const plot = plots[index] ?? plots[index.toLowerCase()];
    if (!plot) continue;
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Recurrence plot of ${index}`);
    canvas.width = canvas.height = plot.length;
    const context = canvas.getContext("2d");
    const highest = Math.max(...plot.flat(), 1e-9);
    plot.forEach((values, y) => values.forEach((value, x) => {
      const grey = Math.round(255 * (1 - value / highest));
      context.fillStyle = `rgb(${grey},${grey},${grey})`;
      context.fillRect(x, y, 1, 1);
    }));
    const caption = document.createElement("figcaption");
    caption.textContent = index;
    figure.append(canvas, caption);
    row.append(figure);
  }
  return row;
}

function line(name, points) {
  return element("path", { class: name, d: points.length ? `M${points.map((p) => p.join(" ")).join("L")}` : "M0 0" });
}

function text(x, y, content, anchor) {
  const made = element("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}

function titled(content) {
  const title = element("title", {});
  title.textContent = content;
  return title;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
