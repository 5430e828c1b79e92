/** The files of a stack, and true-colour pictures of its dates. */

import { Raster, painted, trueColours } from "./raster.js";

const COLOURS = [
  ["B04", "B4", "RED"],
  ["B03", "B3", "GREEN"],
  ["B02", "B2", "BLUE"],
];
const PICTURE = 1024;

/** Dropped files, including those in folders: [{name, file}]; a name contains the folder. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return chosenFiles(transfer.files);
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

export function chosenFiles(list) {
  return [...list].map((file) => ({ name: file.webkitRelativePath || file.name, file }));
}

async function walk(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    found.push({ name: entry.fullPath.replace(/^\//, ""), file });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // A reader returns at most 100 entries at a time.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}

/** A multipart form with the files. */
export function formOf(files, fields = {}) {
  const form = new FormData();
  for (const { name, file } of files) form.append("files", file, name);
  for (const [name, value] of Object.entries(fields)) {
    if (value instanceof File) form.append(name, value, value.name);
    else if (value !== null && value !== undefined && value !== "") form.append(name, value);
  }
  return form;
}

/**
 * Pictures of files with red, green and blue, named by band descriptions or file names. The service
 * reads more forms of stacks than this page can draw.
 *
 * @returns {Promise<{date: string, draw: () => Promise<{canvas: HTMLCanvasElement, raster: Raster}>}[]>}
 */
export async function pictures(files) {
  const byDate = new Map();
  for (const { name, file } of files) {
    if (!/\.tiff?$/i.test(name)) continue;
    const date = dateOf(name);
    if (!byDate.has(date)) byDate.set(date, []);
    byDate.get(date).push({ name, file });
  }
  return [...byDate].sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([date, some]) => ({ date, draw: () => draw(some) }));
}

/** The first date in a name as 2021-03-05; the name itself if there is none. */
export function dateOf(name) {
  const found = name.match(/((?:19|20)\d{2})[-_]?(0[1-9]|1[0-2])[-_]?(0[1-9]|[12]\d|3[01])/);
  return found ? found.slice(1).join("-") : name;
}

async function draw(files) {
  for (const { file } of files) {
    const raster = await Raster.open(file);
    const samples = COLOURS.map((names) => raster.names.findIndex((n) => names.includes(n.toUpperCase())));
    if (samples.every((at) => at >= 0)) return painting(raster, await raster.read(samples, PICTURE));
  }
  const single = COLOURS.map(([band]) => files.find(({ name }) => new RegExp(`(^|[^A-Z0-9])${band}([^0-9A-Z]|$)`, "i").test(name)));
  if (single.every(Boolean)) {
    const rasters = await Promise.all(single.map(({ file }) => Raster.open(file)));
    const parts = await Promise.all(rasters.map((raster) => raster.read([0], PICTURE)));
    return painting(rasters[0], { ...parts[0], bands: parts.map((part) => part.bands[0]) });
  }
  const raster = await Raster.open(files[0].file);
  return painting(raster, await raster.read([0, 0, 0], PICTURE));
}

function painting(raster, pixels) {
  return { raster, canvas: painted(pixels, trueColours(pixels, raster.nodata)) };
}
