/** Reads GeoTIFFs, from files or by range requests, and colours them. */

import { address, keyHeaders } from "./api.js";

const GeoTIFF = globalThis.GeoTIFF;
const LARGEST = 2048;

/** A raster file: its grid, its band names, and its pixels at a size that fits a screen. */
export class Raster {
  /** @param {File | string} source a file, or a path of the service */
  static async open(source) {
    const tiff = typeof source === "string"
      ? await GeoTIFF.fromUrl(address(source), { headers: keyHeaders() })
      : await GeoTIFF.fromBlob(source);
    const image = await tiff.getImage();
    const names = [];
    for (let band = 0; band < image.getSamplesPerPixel(); band++) {
      names.push((await image.getGDALMetadata(band))?.DESCRIPTION || "");
    }
    return new Raster(tiff, image, names);
  }

  constructor(tiff, image, names) {
    this.tiff = tiff;
    this.width = image.getWidth();
    this.height = image.getHeight();
    this.names = names;
    this.nodata = image.getGDALNoData();
    const keys = image.getGeoKeys() || {};
    this.epsg = keys.ProjectedCSTypeGeoKey || keys.GeographicTypeGeoKey || 0;
    /** west, south, east, north in the units of the CRS */
    this.bounds = georeferenced(image) ? image.getBoundingBox() : [0, 0, this.width, this.height];
  }

  /**
   * Pixels of some bands, of the overview that is nearest to the screen.
   *
   * @param {number[]} samples
   * @param {number} largest number of columns or rows
   * @returns {Promise<{width: number, height: number, bands: ArrayLike<number>[]}>}
   */
  async read(samples, largest = LARGEST) {
    const share = Math.min(1, largest / Math.max(this.width, this.height));
    const width = Math.max(1, Math.round(this.width * share));
    const height = Math.max(1, Math.round(this.height * share));
    let image = await this.tiff.getImage();
    for (let at = (await this.tiff.getImageCount()) - 1; at > 0; at--) {
      const overview = await this.tiff.getImage(at);
      if (overview.getWidth() >= width) { image = overview; break; }
    }
    const bands = await image.readRasters({ samples, width, height });
    return { width, height, bands: samples.map((_, at) => bands[at]) };
  }
}

function georeferenced(image) {
  try {
    return Boolean(image.getOrigin());
  } catch {
    return false;
  }
}

/** A canvas of the pixels, coloured by a function of the band values to [r, g, b, a]. */
export function painted({ width, height, bands }, colour) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  const values = new Array(bands.length);
  for (let at = 0; at < width * height; at++) {
    for (let band = 0; band < bands.length; band++) values[band] = bands[band][at];
    picture.data.set(colour(values), 4 * at);
  }
  context.putImageData(picture, 0, 0);
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
  return ([value]) => (Number.isFinite(value) ? rampColour((value - low) / (high - low)) : NOTHING);
}

const RAMP = [[122, 82, 40], [214, 178, 94], [245, 240, 178], [120, 190, 90], [16, 92, 44]];

export function rampColour(share) {
  const position = Math.min(1, Math.max(0, share)) * (RAMP.length - 1);
  const at = Math.min(RAMP.length - 2, Math.floor(position));
  return [...RAMP[at].map((low, c) => low + (RAMP[at + 1][c] - low) * (position - at)), 255];
}

/** True colour, stretched between the 2nd and 98th percentile of all three bands. */
export function trueColours({ bands }, nodata) {
  const sample = [];
  const step = Math.max(1, Math.floor(bands[0].length / 5000));
  for (const band of bands) {
    for (let at = 0; at < band.length; at += step) {
      if (band[at] !== nodata && Number.isFinite(band[at])) sample.push(band[at]);
    }
  }
  sample.sort((a, b) => a - b);
  const low = sample[Math.floor(sample.length * 0.02)] ?? 0;
  const high = sample[Math.floor(sample.length * 0.98)] ?? 1;
  return (values) => (values.some((v) => v === nodata || !Number.isFinite(v))
    ? NOTHING
    : [...values.map((v) => (255 * (v - low)) / (high - low || 1)), 255]);
}

export function rgb(colour) {
  return [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
}
