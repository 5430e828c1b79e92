/** Reads GeoTIFFs, from files or by range requests, and colours them. */

import { address, keyHeaders } from "./api.js";

const GeoTIFF = globalThis.GeoTIFF;
const LARGEST = 2048;
const REDUCED = 1;
const MASK = 4;

/** A raster file: its grid, its band names, and its pixels at several resolutions. */
export class Raster {
  /** @param {File | string} source a file, or a path of the service */
  static async open(source) {
    const tiff = typeof source === "string"
      ? await GeoTIFF.fromUrl(address(source), { headers: keyHeaders() })
      : await GeoTIFF.fromBlob(source);
    const levels = [await tiff.getImage()];
    for (let at = 1; at < (await tiff.getImageCount()); at++) {
      const image = await tiff.getImage(at);
      const kind = image.fileDirectory.getValue("NewSubfileType") || 0;
      if (kind & REDUCED && !(kind & MASK)) levels.push(image);
    }
    const names = [];
    for (let band = 0; band < levels[0].getSamplesPerPixel(); band++) {
      names.push((await levels[0].getGDALMetadata(band))?.DESCRIPTION || "");
    }
    return new Raster(levels, names);
  }

  constructor(levels, names) {
    const [image] = levels;
    /** Images from the full resolution to the coarsest overview, each half as large as the one before. */
    this.levels = levels;
    this.width = image.getWidth();
    this.height = image.getHeight();
    this.names = names;
    this.nodata = image.getGDALNoData();
    /** Side of the blocks in which the file stores its pixels; undefined for strips. */
    this.block = image.isTiled ? image.getTileWidth() : undefined;
    const keys = image.getGeoKeys() || {};
    this.epsg = keys.ProjectedCSTypeGeoKey || keys.GeographicTypeGeoKey || 0;
    /** west, south, east, north in the units of the CRS */
    this.bounds = georeferenced(image) ? image.getBoundingBox() : [0, 0, this.width, this.height];
  }

  /** The finest level with at most so many columns and rows; undefined if every level has more. */
  levelWithin(largest = LARGEST) {
    const level = this.levels.findIndex((one) => Math.max(one.getWidth(), one.getHeight()) <= largest);
    return level < 0 ? undefined : level;
  }

  /**
   * The whole raster, at the finest level that has at most `largest` columns and rows. Of a file
   * without such an overview, every n-th pixel.
   *
   * @param {number[]} samples positions of bands
   * @returns {Promise<{width: number, height: number, bands: ArrayLike<number>[]}>}
   */
  async read(samples, largest = LARGEST) {
    const level = this.levelWithin(largest);
    if (level === undefined) return thinned(this.levels.at(-1), samples, largest);
    const image = this.levels[level];
    return this.window(samples, level, [0, 0, image.getWidth(), image.getHeight()]);
  }

  /**
   * A part of a level.
   *
   * @param {number[]} samples positions of bands
   * @param {number} level position in `levels`
   * @param {[number, number, number, number]} window left, top, right and bottom in its pixels
   * @param {AbortSignal} [signal]
   */
  async window(samples, level, [left, top, right, bottom], signal) {
    const bands = await this.levels[level].readRasters({ samples, window: [left, top, right, bottom], signal });
    return { width: right - left, height: bottom - top, bands: samples.map((_, at) => bands[at]) };
  }
}

/** Every n-th pixel of an image, read a row of blocks at a time, so that memory stays bounded. */
async function thinned(image, samples, largest) {
  const [columns, rows] = [image.getWidth(), image.getHeight()];
  const share = largest / Math.max(columns, rows);
  const width = Math.max(1, Math.round(columns * share));
  const height = Math.max(1, Math.round(rows * share));
  const bands = samples.map(() => new Float32Array(width * height));
  const depth = image.getTileHeight();
  const columnOf = Array.from({ length: width }, (_, x) => Math.floor(((x + 0.5) * columns) / width));
  const rowOf = (y) => Math.floor(((y + 0.5) * rows) / height);
  for (let y = 0; y < height;) {
    const top = rowOf(y) - (rowOf(y) % depth);
    const bottom = Math.min(rows, top + depth);
    const strip = await image.readRasters({ samples, window: [0, top, columns, bottom] });
    for (; y < height && rowOf(y) < bottom; y++) {
      const from = (rowOf(y) - top) * columns;
      bands.forEach((band, at) => {
        for (let x = 0; x < width; x++) band[y * width + x] = strip[at][from + columnOf[x]];
      });
    }
  }
  return { width, height, bands };
}

function georeferenced(image) {
  try {
    return Boolean(image.getOrigin());
  } catch {
    return false;
  }
}

/** Paint pixels on a canvas, coloured by a function of the band values to [r, g, b, a]. */
export function paint(canvas, { width, height, bands }, colour) {
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const values = new Array(bands.length);
  for (let at = 0; at < width * height; at++) {
    for (let band = 0; band < bands.length; band++) values[band] = bands[band][at];
    picture.data.set(colour(values), 4 * at);
  }
  context.putImageData(picture, 0, 0);
}

/** A new canvas of the pixels' size. */
export function painted(pixels, colour) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [pixels.width, pixels.height];
  paint(canvas, pixels, colour);
  return canvas;
}

const NOTHING = [0, 0, 0, 0];

/** Colours of classes by value; the legend is that of a model's card. */
export function classColours(classes) {
  const table = new Map(classes.map((one) => [one.value, [...rgb(one.color), 255]]));
  return ([value]) => table.get(value) || NOTHING;
}

/** A colour ramp from brown over yellow to green between two values. */
export function rampColours(low, high) {
  return ([value]) => (Number.isFinite(value) ? rampColour((value - low) / (high - low || 1)) : NOTHING);
}

const RAMP = [[122, 82, 40], [214, 178, 94], [245, 240, 178], [120, 190, 90], [16, 92, 44]];

export function rampColour(share) {
  const position = Math.min(1, Math.max(0, share)) * (RAMP.length - 1);
  const at = Math.min(RAMP.length - 2, Math.floor(position));
  return [...RAMP[at].map((low, c) => low + (RAMP[at + 1][c] - low) * (position - at)), 255];
}

/** True colour, stretched between the 2nd and 98th percentile of all three bands. */
export function trueColours({ bands }, nodata) {
  const [low, high] = percentiles(bands, [0.02, 0.98], nodata);
  return (values) => (values.some((v) => v === nodata || !Number.isFinite(v))
    ? NOTHING
    : [...values.map((v) => (255 * (v - low)) / (high - low || 1)), 255]);
}

/**
 * Percentiles of the values of some bands, from a sample of 5,000 values per band.
 *
 * @param {ArrayLike<number>[]} bands
 * @param {number[]} shares 0 to 1
 * @param {number} [nodata]
 */
export function percentiles(bands, shares, nodata) {
  const sample = [];
  const step = Math.max(1, Math.floor(bands[0].length / 5000));
  for (const band of bands) {
    for (let at = 0; at < band.length; at += step) {
      if (band[at] !== nodata && Number.isFinite(band[at])) sample.push(band[at]);
    }
  }
  sample.sort((a, b) => a - b);
  return shares.map((share) => sample[Math.floor(sample.length * share)] ?? share);
}

export function rgb(colour) {
  return [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
}
