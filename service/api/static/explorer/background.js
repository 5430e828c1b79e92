/** The background map: Web Mercator tiles, drawn in the CRS of the raster. */

const L = globalThis.L;
const SIDE = 256;
/** Cells along each side of a tile; within a cell the two projections differ by an affine map. */
const CELLS = 4;
const FINEST = 19;
/** Largest number of Web Mercator tiles that one tile of the map is drawn from. */
const MOST = 25;

/** Position in the Web Mercator square, from 0 to 1 from west to east and from north to south. */
function mercator([lon, lat]) {
  return [lon / 360 + 0.5, 0.5 - Math.asinh(Math.tan((lat * Math.PI) / 180)) / (2 * Math.PI)];
}

export const BackgroundLayer = L.GridLayer.extend({
  /**
   * @param {string} template URL with {z}, {x} and {y}
   * @param {{toLonLat: (x: number, y: number) => [number, number]}} projection of the map's CRS
   */
  initialize(template, projection, options) {
    this.template = template;
    this.projection = projection;
    L.GridLayer.prototype.initialize.call(this, { tileSize: SIDE, updateWhenZooming: false, ...options });
  },

  createTile(coords, done) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = SIDE;
    const context = tile.getContext("2d");
    const corners = this._corners(coords);
    const zoom = this._zoomFor(corners);
    Promise.all(tilesUnder(corners, zoom).map(async ([x, y]) => {
      const image = await loaded(this._url(x, y, zoom));
      if (image) drawWarped(context, image, corners, x, y, 2 ** zoom);
    })).then(() => done(null, tile));
    return tile;
  },

  /** Web Mercator positions of the corners of the cells of a tile, row by row. */
  _corners({ x, y, z }) {
    const rows = [];
    for (let row = 0; row <= CELLS; row++) {
      rows.push([]);
      for (let column = 0; column <= CELLS; column++) {
        const point = L.point(SIDE * (x + column / CELLS), SIDE * (y + row / CELLS));
        const { lng, lat } = this._map.unproject(point, z);
        rows[row].push(mercator(this.projection.toLonLat(lng, lat)));
      }
    }
    return rows;
  },

  /** Zoom at which a Web Mercator tile has about the scale of the map. */
  _zoomFor(corners) {
    const [[left, top], [right, bottom]] = [corners[0][0], corners[CELLS][CELLS]];
    const zoom = Math.round(-Math.log2(Math.hypot(right - left, bottom - top) / Math.SQRT2));
    return Math.min(FINEST, Math.max(0, zoom));
  },

  _url(x, y, z) {
    const values = { x, y, z };
    return this.template.replace(/\{([xyz])\}/g, (_, name) => values[name]);
  },
});

/** Columns and rows of the Web Mercator tiles under a tile; none for a tile outside the square. */
function tilesUnder(corners, zoom) {
  const all = corners.flat();
  if (!all.flat().every(Number.isFinite)) return [];
  const count = 2 ** zoom;
  const range = (axis) => {
    const positions = all.map((position) => position[axis] * count);
    return [Math.max(0, Math.floor(Math.min(...positions))), Math.min(count - 1, Math.floor(Math.max(...positions)))];
  };
  const [[left, right], [top, bottom]] = [range(0), range(1)];
  if ((right - left + 1) * (bottom - top + 1) > MOST) return [];
  const found = [];
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) found.push([x, y]);
  }
  return found;
}

/** An image; null if it cannot be loaded, because the map works without its background. */
function loaded(url) {
  return new Promise((resolve) => {
    const image = new Image();
    // Many tile servers reject requests that do not name the site; this sends its origin alone.
    image.referrerPolicy = "origin";
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = url;
  });
}

/** Draw a Web Mercator tile on a tile of the map, cell by cell. */
function drawWarped(context, image, corners, column, row, count) {
  const side = SIDE / CELLS;
  for (let y = 0; y < CELLS; y++) {
    for (let x = 0; x < CELLS; x++) {
      // Corners of the cell in pixels of the image.
      const [[x0, y0], [x1, y1], [x2, y2]] = [corners[y][x], corners[y][x + 1], corners[y + 1][x]]
        .map(([u, v]) => [(u * count - column) * image.width, (v * count - row) * image.height]);
      const [a, b, c, d] = [x1 - x0, x2 - x0, y1 - y0, y2 - y0];
      const determinant = a * d - b * c;
      if (!determinant) continue;
      // The map from the image to the cell is the inverse of the one from the cell to the image.
      const [m11, m12, m21, m22] = [d, -c, -b, a].map((value) => (value * side) / determinant);
      context.save();
      context.beginPath();
      context.rect(x * side, y * side, side, side);
      context.clip();
      context.setTransform(m11, m12, m21, m22, x * side - m11 * x0 - m21 * y0, y * side - m12 * x0 - m22 * y0);
      context.drawImage(image, 0, 0);
      context.restore();
    }
  }
}
