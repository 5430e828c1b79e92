/** The map: layers on the grid of the stack, a swipe between them, points and polygons. */

import { BackgroundLayer } from "./background.js";
import { projection } from "./geo.js";

const L = globalThis.L;

/**
 * Tiles of a raster's finer levels. A tile is drawn when it comes into view and freed when it leaves;
 * one tile is one block of the file, so that no block is decoded twice for a view.
 */
const DetailLayer = L.GridLayer.extend({
  /** @param {{level: number, block: number, draw: Function}} detail see `ExplorerMap.put` */
  initialize(detail, options) {
    this.detail = detail;
    L.GridLayer.prototype.initialize.call(this, {
      ...options, tileSize: detail.block, maxNativeZoom: 0, minNativeZoom: 1 - detail.level,
      minZoom: 1 - detail.level, keepBuffer: 1, updateWhenZooming: false, noWrap: true,
    });
    this.on("tileunload", ({ tile }) => tile.reading.abort());
  },

  createTile({ x, y, z }, done) {
    const { block, draw } = this.detail;
    const tile = document.createElement("canvas");
    tile.width = tile.height = block;
    Object.assign(tile.dataset, { level: -z, left: x * block, top: y * block });
    tile.reading = new AbortController();
    draw(tile, -z, x * block, y * block, tile.reading.signal)
      .then(() => done(null, tile), (error) => tile.reading.signal.aborted || done(error, tile));
    return tile;
  },
});

export class ExplorerMap {
  /**
   * @param {HTMLElement} element
   * @param {{selected: (lonLat: [number, number] | null) => void, failed: (error: Error) => void,
   *          background: string}} page `background` is a URL template of Web Mercator tiles, or empty
   */
  constructor(element, page) {
    this.element = element;
    this.page = page;
    this.map = null;
    this.layers = { picture: [], result: [] };
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.map) this._select(this.map.getCenter());
    });
  }

  /** Show the extent of a raster: a new map if the grid is another one. */
  show(raster) {
    const [west, south, east, north] = raster.bounds;
    const grid = `${raster.epsg} ${raster.bounds.join(" ")}`;
    if (this.grid === grid) return;
    this.grid = grid;
    this.projection = projection(raster.epsg);
    this.map?.remove();
    const size = (east - west) / raster.width;
    // Zoom 0 shows a pixel of the raster as a pixel of the screen.
    const crs = L.Util.extend({}, L.CRS.Simple, {
      transformation: new L.Transformation(1 / size, -west / size, -1 / size, north / size),
    });
    this.bounds = L.latLngBounds([south, west], [north, east]);
    this.map = L.map(this.element, {
      crs, minZoom: -8, maxZoom: 7, zoomSnap: 0.5, attributionControl: false, fadeAnimation: false,
      maxBounds: this.bounds.pad(1), zoomAnimation: !matchMedia("(prefers-reduced-motion: reduce)").matches,
    });
    for (const [name, order] of [["background", 250], ["picture", 300], ["result", 350]]) {
      this.map.createPane(name).style.zIndex = order;
    }
    this.map.fitBounds(this.bounds);
    if (this.page.background && this.projection) {
      new BackgroundLayer(this.page.background, this.projection, { pane: "background" }).addTo(this.map);
    }
    this.layers = { picture: [], result: [] };
    this.points = L.layerGroup().addTo(this.map);
    this.mark = null;
    this.map.on("click", (event) => this._select(event.latlng));
    this.map.on("move zoomend resize", () => this.swipe(this.share || 0));
  }

  /**
   * Replace a layer.
   *
   * @param {"picture" | "result"} pane
   * @param {HTMLCanvasElement} canvas the whole raster, at one of its levels
   * @param {Raster} raster
   * @param {{level: number, block: number,
   *          draw: (canvas: HTMLCanvasElement, level: number, left: number, top: number, signal: AbortSignal) => Promise<void>}} [detail]
   *        draws a block of a finer level than that of `canvas`, which is `level`
   */
  put(pane, canvas, raster, detail) {
    this.remove(pane);
    const [west, south, east, north] = raster.bounds;
    const bounds = [[south, west], [north, east]];
    // An SVG overlay takes any element and scales it by its bounds.
    this._add(pane, L.svgOverlay(canvas, bounds, { pane }));
    if (!detail) return;
    const tiles = new DetailLayer(detail, { pane, bounds });
    tiles.on("tileerror", ({ error }) => this.page.failed(error));
    this._add(pane, tiles);
  }

  /** Replace the result by polygons in longitude and latitude. */
  putPolygons(collection, style, describe) {
    this.remove("result");
    this._add("result", L.geoJSON(collection, {
      pane: "result",
      coordsToLatLng: ([lon, lat]) => {
        const [x, y] = this.projection.fromLonLat(lon, lat);
        return L.latLng(y, x);
      },
      style,
      onEachFeature: (feature, layer) => layer.on("click", (event) => {
        L.DomEvent.stopPropagation(event);
        describe(feature);
      }),
    }));
  }

  _add(pane, layer) {
    this.layers[pane].push(layer.addTo(this.map));
  }

  remove(pane) {
    for (const layer of this.layers[pane].splice(0)) layer.remove();
  }

  opacity(share) {
    const pane = this.map?.getPane("result");
    if (pane) pane.style.opacity = share;
  }

  /** Hide the result left of a share of the map's width. */
  swipe(share) {
    this.share = share;
    const pane = this.map?.getPane("result");
    if (!pane) return;
    const { x, y } = this.map.getSize();
    const from = this.map.containerPointToLayerPoint([x * share, 0]);
    const to = this.map.containerPointToLayerPoint([x, y]);
    pane.style.clip = share ? `rect(${from.y}px, ${to.x}px, ${to.y}px, ${from.x}px)` : "auto";
  }

  /** Add a labelled point. Returns a function that removes it. */
  addPoint([lon, lat], colour, text) {
    const [x, y] = this.projection.fromLonLat(lon, lat);
    const point = L.circleMarker([y, x], { radius: 6, color: "#111", weight: 1.5, fillColor: colour, fillOpacity: 1 });
    point.bindTooltip(text).addTo(this.points);
    return () => point.remove();
  }

  _select(latlng) {
    if (!this.bounds.contains(latlng)) return;
    this.mark?.remove();
    this.mark = L.circleMarker(latlng, { radius: 7, color: "#fff", weight: 3, fill: false }).addTo(this.map);
    this.page.selected(this.projection ? this.projection.toLonLat(latlng.lng, latlng.lat) : null);
  }
}
