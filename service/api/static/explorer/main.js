/** The explorer page: choose a stack, run a task, view the result, inspect a pixel. */

import { Problem, requestKey, address, json, keyHeaders, send } from "./api.js";
import { attributionChart, backtestTable, plotFigures, probabilityTable, seriesChart, seriesKey } from "./chart.js";
import { ExplorerMap } from "./map.js";
import { Raster, classColours, paint, painted, percentiles, rampColour, rampColours, rgb } from "./raster.js";
import { chosenFiles, droppedFiles, formOf, pictures } from "./stack.js";
import { Teacher } from "./teach.js";

const POLL_MS = 500;
/** The raster of each task's result that the page shows. */
const OUTPUTS = { "classify-pixels": "class", landcover: "class", forecast: "forecast", similar: "similarity" };
const FORECAST_LIMITS = [-0.1, 0.9];
const UNITS = ["B", "kB", "MB", "GB"];
const part = (id) => document.getElementById(id);

const state = {
  /** @type {{name: string, file: File}[]} */
  files: [],
  pictures: [],
  /** Cards by model name. */
  models: new Map(),
  defaults: {},
  /** Id of the job whose end the page waits for. */
  job: null,
  upload: null,
  teacher: null,
};

const background = document.querySelector("meta[name=pimc-background]");
const map = new ExplorerMap(part("map"), {
  selected: (lonLat) => inspect(lonLat),
  failed: (error) => showProblem(error),
  background: background?.content ?? "",
});

// Messages -------------------------------------------------------------------------------------

function showStatus(text) {
  part("status").textContent = text;
}

function showProblem(error) {
  if (error instanceof DOMException && error.name === "AbortError") return;
  const box = part("problem");
  const title = document.createElement("strong");
  title.textContent = error instanceof Problem ? error.title : "An error occurred in this page";
  const detail = document.createElement("p");
  detail.textContent = error.message;
  box.replaceChildren(title, detail);
  box.hidden = false;
}

function clearProblem() {
  part("problem").hidden = true;
  showStatus("");
}

/** Run a function, and show its error if it fails. */
async function guarded(work) {
  clearProblem();
  try {
    return await work();
  } catch (error) {
    showProblem(error);
    return undefined;
  }
}

// The stack ------------------------------------------------------------------------------------

async function take(files) {
  if (!files.length) return;
  state.files = files;
  part("run").disabled = false;
  const bytes = files.reduce((sum, { file }) => sum + file.size, 0);
  const facts = part("stack-facts");
  facts.textContent = `${files.length} file${files.length > 1 ? "s" : ""}, ${size(bytes)}.`;
  await guarded(async () => {
    state.pictures = await pictures(files);
    part("date-row").hidden = state.pictures.length < 2;
    part("date").max = Math.max(0, state.pictures.length - 1);
    part("date").value = 0;
    if (state.pictures.length) {
      await showPicture(0);
      facts.textContent += ` ${state.pictures.length} dates by file name, from ${state.pictures[0].date} to ${state.pictures.at(-1).date}.`;
    } else {
      facts.textContent += " This page cannot draw these files; the service can read them.";
    }
  });
  await examine();
}

/** Show what the service reads in the stack, and whether it would reject it, before a run. */
async function examine() {
  const files = state.files;
  const box = part("findings");
  box.replaceChildren("The service is reading the files…");
  const path = `validate?task=${encodeURIComponent(part("task").value)}`;
  const found = await guarded(() => json(path, { method: "POST", body: formOf(files, { model: part("model").value }) }));
  if (files !== state.files) return; // another stack was chosen meanwhile
  box.replaceChildren();
  if (!found) return;
  if (!found.valid) {
    showProblem(new Problem(422, { ...found.problem, title: "The service would reject this stack" }));
    return;
  }
  const { pixels, dates, seconds } = found.estimate;
  const time = seconds ? `, ${Math.ceil(seconds.shortest)} to ${Math.ceil(seconds.longest)} s` : "";
  const line = document.createElement("p");
  line.className = "hint";
  line.textContent = `A run would use ${dates} dates and predict ${pixels.toLocaleString()} pixels${time}.`;
  box.append(line, ...warnings(found.warnings));
}

async function showPicture(at) {
  const picture = state.pictures[at];
  part("date-text").textContent = picture.date;
  const { canvas, raster } = await picture.draw();
  if (Number(part("date").value) !== at) return; // another date was chosen meanwhile
  map.show(raster);
  map.put("picture", canvas, raster);
}

function size(bytes) {
  let unit = 0;
  while (bytes >= 1000 && unit < UNITS.length - 1) { bytes /= 1000; unit += 1; }
  return `${bytes.toFixed(unit ? 1 : 0)} ${UNITS[unit]}`;
}

// Models ---------------------------------------------------------------------------------------

async function loadModels(choice) {
  const [found, own] = await Promise.all([json("models"), json("heads")]);
  state.models = new Map([...found.models, ...own.heads].map((card) => [card.name, card]));
  state.defaults = found.defaults;
  offerModels(choice);
}

function offerModels(choice) {
  const task = part("task").value;
  const fitting = [...state.models.values()].filter((card) => card.task === task);
  part("model").replaceChildren(...fitting.map((card) => new Option(card.name, card.name)));
  part("model").value = choice && fitting.some((card) => card.name === choice) ? choice : state.defaults[task] ?? "";
  describeModel();
}

function describeModel() {
  const card = state.models.get(part("model").value);
  part("model-text").textContent = [card?.description, card?.intended_use].filter(Boolean).join(" ");
}

// Runs -----------------------------------------------------------------------------------------

function run() {
  const [fields] = part("fields").files;
  return submit(part("task").value, { model: part("model").value, fields });
}

/** Upload the stack with a task's parameters as a job, and wait for its result. */
async function submit(task, parameters) {
  busy(true, "Uploading the files");
  state.upload = new AbortController();
  const job = await guarded(async () => {
    const response = await send(task, {
      method: "POST",
      headers: { Prefer: "respond-async" },
      body: formOf(state.files, parameters),
      progress: (share) => progress(100 * share, `Uploading the files: ${Math.round(100 * share)} %`),
      signal: state.upload.signal,
    });
    return JSON.parse(await response.blob.text());
  });
  state.upload = null;
  if (job) await follow(job.jobID);
  busy(false);
}

/** Wait for a job, then show its result. */
async function follow(id) {
  state.job = id;
  location.hash = `job=${id}`;
  busy(true, "Waiting for a free worker");
  const info = await guarded(async () => {
    for (;;) {
      const found = await jobStatus(id);
      if (found.status === "running") progress(found.progress, `Running: ${found.progress} %`);
      if (!["accepted", "running"].includes(found.status)) return found;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  });
  busy(false);
  state.job = null;
  guarded(listJobs);
  if (info) await guarded(() => open(info));
}

/** A job's status; retried if the connection is lost. */
async function jobStatus(id) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await json(`jobs/${id}`);
    } catch (error) {
      const temporary = error instanceof Problem && (error.status === 0 || error.status === 503);
      if (!temporary || attempt >= 20) throw error;
      showStatus("The connection was lost. Retrying…");
      await new Promise((resolve) => setTimeout(resolve, Math.min(5000, 500 * 2 ** attempt)));
    }
  }
}

async function cancel() {
  state.upload?.abort();
  if (state.job) await guarded(() => send(`jobs/${state.job}`, { method: "DELETE" }));
}

function busy(on, text = "") {
  part("run").disabled = on || !state.files.length;
  part("cancel").hidden = !on;
  part("progress-row").hidden = !on;
  if (on) progress(0, text);
}

function progress(percent, text) {
  part("progress").value = percent;
  part("progress-text").textContent = text;
}

async function listJobs() {
  const { jobs } = await json("jobs?limit=20");
  part("jobs").replaceChildren(...jobs.map((job) => {
    const button = document.createElement("button");
    button.type = "button";
    const when = new Date(job.created).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    button.textContent = `${job.processID}, ${when}: ${job.status}`;
    button.addEventListener("click", () => follow(job.jobID));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

// Results --------------------------------------------------------------------------------------

async function open(info) {
  part("result").hidden = false;
  const body = part("result-body");
  body.replaceChildren();
  if (info.status === "dismissed") {
    body.textContent = "This run was cancelled.";
    return;
  }
  if (info.status === "failed") {
    part("result").hidden = true;
    await json(`jobs/${info.jobID}/result`); // throws the job's problem
    return;
  }
  const result = `jobs/${info.jobID}/result`;
  const output = OUTPUTS[info.processID];
  let summary;
  try {
    summary = await json(result);
  } catch (error) {
    if (!(error instanceof Problem) || error.status !== 406) throw error;
    await openFields(info, body);
    return;
  }
  if (summary.type === "FeatureCollection") {
    await openFields(info, body);
    return;
  }
  body.append(...remarks(summary), summaryTable(summary));
  if (summary.backtest) body.append(backtestTable(summary.backtest, "this stack"));
  const model = (summary.model ?? "").split("@")[0];
  body.append(...downloads(info, output, model));
  if (!output) return;
  const raster = await Raster.open(`${result}/${output}`);
  map.show(raster);
  const card = state.models.get(model);
  const classes = card?.classes?.length ? card.classes : null;
  const limits = info.processID === "forecast" ? FORECAST_LIMITS : null;
  part("layers").hidden = false;
  part("band").replaceChildren(...raster.names.map((name, at) => new Option(name || output, at)));
  part("band").onchange = () => guarded(() => draw(raster, Number(part("band").value), classes, limits));
  await draw(raster, 0, classes, limits);
}

/**
 * Show a band of a result, with tiles of its finer levels where it is larger than one canvas.
 *
 * @param {{value: number, name: string, color: string}[] | null} classes null for a colour ramp
 * @param {[number, number] | null} limits of the colour ramp; null for those of the values
 */
async function draw(raster, band, classes, limits) {
  const pixels = await raster.read([band]);
  const ends = limits ?? percentiles(pixels.bands, [0.02, 0.98]);
  const colours = classes ? classColours(classes) : rampColours(...ends);
  const level = raster.levelWithin();
  map.put("result", painted(pixels, colours), raster, level && {
    level,
    block: raster.block,
    draw: async (tile, at, left, top, signal) => {
      const image = raster.levels[at];
      const [right, bottom] = [Math.min(image.getWidth(), left + raster.block), Math.min(image.getHeight(), top + raster.block)];
      if (right > left && bottom > top) paint(tile, await raster.window([band], at, [left, top, right, bottom], signal), colours);
    },
  });
  map.opacity(part("opacity").value / 100);
  map.swipe(part("swipe").value / 100);
  showLegend(classes, ends);
}

async function openFields(info, body) {
  const collection = await json(`jobs/${info.jobID}/result`, { headers: { Accept: "application/geo+json" } });
  body.append(...remarks(collection));
  const model = (collection.model ?? "").split("@")[0];
  const card = state.models.get(model);
  const colours = new Map((card?.classes ?? []).map((one) => [one.value, one.color]));
  body.append(...downloads(info, null, model));
  if (!map.map) {
    body.append(Object.assign(document.createElement("p"), { className: "hint", textContent: "Choose the stack again to see the fields on its picture." }));
    return;
  }
  map.putPolygons(collection, (feature) => ({
    color: "#111", weight: 1, fillColor: colours.get(feature.properties.value) ?? "#888", fillOpacity: 0.7,
  }), describeField);
  showLegend(card?.classes?.length ? card.classes : null);
  part("layers").hidden = false;
}

function describeField(feature) {
  const body = part("pixel-body");
  body.replaceChildren();
  const table = document.createElement("table");
  for (const [name, value] of Object.entries(feature.properties)) {
    if (value !== null && typeof value === "object") continue;
    const row = table.insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = typeof value === "number" ? Number(value.toFixed(4)) : value;
  }
  body.append(table);
  if (feature.properties.probabilities) body.append(probabilityTable(feature.properties.probabilities));
  if (state.files.length) body.append(similarButton("field", feature.geometry));
}

/** A button that maps how similar every pixel is to a point or a polygon. */
function similarButton(kind, geometry) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = `Find pixels similar to this ${kind}`;
  const places = JSON.stringify({ type: "FeatureCollection", features: [{ type: "Feature", properties: {}, geometry }] });
  button.addEventListener("click", () => submit("similar", { [geometry.type === "Point" ? "points" : "fields"]: places }));
  return button;
}

/** What the model's results are good for, and the warnings, of which `outside_training` ends with it. */
function remarks(answer) {
  const list = answer.warnings ?? [];
  const use = list.some(({ code }) => code === "outside_training") ? "" : answer.intended_use;
  if (!use) return warnings(list);
  const line = document.createElement("p");
  line.className = "hint";
  line.textContent = use;
  return [line, ...warnings(list)];
}

function warnings(list) {
  return list.map(({ code, detail }) => {
    const box = document.createElement("p");
    box.className = "warning";
    const name = document.createElement("strong");
    name.textContent = `${code}: `;
    box.append(name, detail);
    return box;
  });
}

function summaryTable(summary) {
  const table = document.createElement("table");
  if (!summary.classes) return table;
  table.innerHTML = "<thead><tr><th scope=col>Class<th scope=col class=number>Hectares<th scope=col class=number>Confidence</thead>";
  const body = table.createTBody();
  for (const one of summary.classes.filter((row) => row.pixels > 0)) {
    const row = body.insertRow();
    row.insertCell().textContent = one.name;
    for (const value of [one.hectares?.toFixed(1), one.mean_confidence?.toFixed(2)]) {
      const cell = row.insertCell();
      cell.className = "number";
      cell.textContent = value ?? "";
    }
  }
  return table;
}

function showLegend(classes, [low, high] = FORECAST_LIMITS) {
  const legend = part("legend");
  const swatch = (text, paint, className = "swatch") => {
    const item = document.createElement("span");
    item.className = className;
    const canvas = document.createElement("canvas");
    paint(canvas);
    item.append(canvas, text);
    return item;
  };
  if (classes) {
    legend.replaceChildren(...classes.map((one) => swatch(one.name, (canvas) => {
      [canvas.width, canvas.height] = [1, 1];
      fill(canvas, 0, [...rgb(one.color), 255]);
    })));
    return;
  }
  const text = (value) => value.toFixed(Math.abs(high - low) < 0.5 ? 2 : 1).replace("-", "−");
  legend.replaceChildren(text(low), swatch(text(high), (canvas) => {
    [canvas.width, canvas.height] = [100, 1];
    for (let at = 0; at < 100; at++) fill(canvas, at, rampColour(at / 99));
  }, "swatch ramp"));
}

function fill(canvas, x, [r, g, b]) {
  const context = canvas.getContext("2d");
  context.fillStyle = `rgb(${r},${g},${b})`;
  context.fillRect(x, 0, 1, 1);
}

/** Buttons that download the result, and commands that do the same. */
function downloads(info, output, model) {
  const result = `jobs/${info.jobID}/result`;
  const kinds = output
    ? [["GeoTIFF (COG)", `${result}/${output}`, "", `${output}.tif`], ["Zip with QGIS style", result, "application/zip", "result.zip"]]
    : [["GeoJSON", result, "application/geo+json", "fields.geojson"], ["CSV", result, "text/csv", "fields.csv"], ["GeoParquet", result, "application/vnd.apache.parquet", "fields.parquet"]];
  const buttons = document.createElement("p");
  buttons.className = "buttons";
  for (const [text, path, accept, name] of kinds) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => guarded(async () => {
      const { blob } = await send(path, accept ? { headers: { Accept: accept } } : {});
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    }));
    buttons.append(button);
  }
  const key = "X-API-Key" in keyHeaders() ? ' -H "X-API-Key: $PIMC_API_KEY"' : "";
  const lines = document.createElement("pre");
  lines.tabIndex = 0;
  lines.textContent = [
    "# curl",
    `curl --fail-with-body${key} -F files=@2021-01-05.tif … \\`,
    `  ${info.processID === "similar" ? "-F points=@places.geojson " : ""}-F model=${model} -o result.tif ${address(info.processID)}`,
    "",
    "# Python",
    "from pimc_client import Client",
    `client = Client("${address("").replace(/\/$/, "")}")`,
    `client.job("${info.jobID}").result()`,
  ].join("\n");
  return [buttons, lines];
}

// One pixel ------------------------------------------------------------------------------------

/** Show the series of a selected pixel, and what models predict from it; or label the pixel. */
async function inspect(lonLat) {
  const body = part("pixel-body");
  if (!lonLat) {
    body.textContent = "Pixels cannot be selected on this raster: the page supports UTM zones, EPSG:4326, EPSG:3857 and EPSG:3035.";
    return;
  }
  if (state.teacher?.take(lonLat)) return;
  body.replaceChildren(Object.assign(document.createElement("p"), {
    className: "hint", textContent: `Longitude ${lonLat[0].toFixed(6)}, latitude ${lonLat[1].toFixed(6)}`,
  }));
  if (!state.files.length) {
    body.append("Choose the stack to see the series of the pixel.");
    return;
  }
  await guarded(async () => {
    const geometry = { type: "Point", coordinates: lonLat };
    const geojson = JSON.stringify({ type: "FeatureCollection", features: [{ type: "Feature", properties: {}, geometry }] });
    const found = await measuredAt({ points: geojson, plots: "true" })
      .catch((error) => {
        // Recurrence plots need a model whose card describes them.
        if (![404, 422].includes(error.status)) throw error;
        return measuredAt({ points: geojson });
      });
    const measured = found.features[0].properties;
    if (measured.status !== "ok") {
      body.append(`This pixel has no clear observation (status: ${measured.status}).`);
      return;
    }
    const { result: forecast, backtest } = await predicted("forecast", measured, state.defaults.forecast, { backtest: true });
    body.append(seriesChart(measured, forecast ?? null), seriesKey(forecast));
    if (backtest) body.append(backtestTable(backtest, "this pixel"));
    if (measured.plots) body.append(plotFigures(measured.plots));
    const card = state.models.get(part("model").value);
    const classes = card?.task === "classify-pixels" ? card.name : state.defaults["classify-pixels"];
    const { result } = await predicted("classify-pixels", measured, classes, { outputs: ["class", "attribution"] });
    if (result) {
      body.append(probabilityTable(result.probabilities));
      body.append(attributionChart(result.attribution, result.class));
    }
    body.append(similarButton("pixel", geometry));
  });
}

function measuredAt(fields) {
  return json("series", { method: "POST", body: formOf(state.files, fields), headers: { Accept: "application/geo+json" } });
}

/**
 * A model's prediction for a measured series: `result`, and `backtest` if there is one. Without
 * `result` if the service has no such model, or the series lacks bands or dates.
 */
async function predicted(task, measured, model, more = {}) {
  const card = state.models.get(model);
  if (!card) return {};
  const there = measured.dates.map((_, at) => at).filter((at) => measured.clear[at] > 0);
  const series = { id: "pixel", dates: there.map((at) => measured.dates[at]) };
  for (const band of card.bands) {
    if (!measured[band]) return {};
    series[band] = there.map((at) => measured[band][at]);
  }
  try {
    const found = await json(task, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ series: [series], model, ...more }),
    });
    return found.results[0].status === "ok" ? { result: found.results[0], backtest: found.backtest } : {};
  } catch (error) {
    if (error instanceof Problem && error.status === 422) return {};
    throw error;
  }
}

// The demo -------------------------------------------------------------------------------------

async function offerDemo() {
  try {
    state.demo = (await json("explorer/demo")).files;
    part("open-demo").hidden = !state.demo.length;
  } catch (error) {
    if (!(error instanceof Problem) || error.status !== 404) throw error;
  }
}

async function openDemo() {
  showStatus("Downloading the demo");
  const downloads = state.demo.map(async (name) => {
    const { blob } = await send(`explorer/demo/${encodeURIComponent(name)}`);
    return { name, file: new File([blob], name) };
  });
  // The first date is shown while the others are downloaded.
  const [first] = await pictures([await downloads[0]]);
  if (first) {
    const { canvas, raster } = await first.draw();
    map.show(raster);
    map.put("picture", canvas, raster);
  }
  const files = await Promise.all(downloads);
  showStatus("");
  await take(files);
}

// Start ----------------------------------------------------------------------------------------

part("choose-files").addEventListener("click", () => part("files").click());
part("choose-folder").addEventListener("click", () => part("folder").click());
for (const id of ["files", "folder"]) {
  part(id).addEventListener("change", (event) => guarded(() => take(chosenFiles(event.target.files))));
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    part("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") guarded(async () => take(await droppedFiles(event.dataTransfer)));
  });
}
part("open-demo").addEventListener("click", () => guarded(openDemo));
part("date").addEventListener("input", (event) => guarded(() => showPicture(Number(event.target.value))));
part("task").addEventListener("change", () => { offerModels(); if (state.files.length) examine(); });
part("model").addEventListener("change", () => { describeModel(); if (state.files.length) examine(); });
part("run-form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
part("cancel").addEventListener("click", cancel);
part("opacity").addEventListener("input", (event) => map.opacity(event.target.value / 100));
part("swipe").addEventListener("input", (event) => map.swipe(event.target.value / 100));
part("set-key").addEventListener("click", async () => {
  if (await requestKey()) guarded(() => loadModels());
});

if (background) {
  part("attribution").hidden = false;
  part("attribution").textContent = `Background map: ${background.dataset.attribution}`;
}

await guarded(async () => {
  await loadModels();
  await Promise.all([listJobs(), offerDemo()]);
  state.teacher = new Teacher(part("teach-body"), {
    addPoint: (lonLat, colour, name) => map.addPoint(lonLat, colour, name),
    files: () => state.files,
    taught: (name) => guarded(() => loadModels(name)),
    failed: showProblem,
    warnings,
  });
  const job = new URLSearchParams(location.hash.slice(1)).get("job");
  if (job) await follow(job);
});
document.documentElement.dataset.ready = "yes";
