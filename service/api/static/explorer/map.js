/** The map: layers on the grid of the stack, a swipe between them, points and polygons. */

import { projection } from "./geo.js";

const L = globalThis.L;

export class ExplorerMap {
  /** @param {HTMLElement} element @param {(lonLat: [number, number] | null) => void} selected */
  constructor(element, selected) {
    this.element = element;
    this.selected = selected;
    this.map = null;
    this.layers = { picture: null, result: null };
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
      crs, minZoom: -8, maxZoom: 7, zoomSnap: 0.5, attributionControl: false,
      maxBounds: this.bounds.pad(1), zoomAnimation: !matchMedia("(prefers-reduced-motion: reduce)").matches,
    });
    this.map.fitBounds(this.bounds);
    for (const [name, order] of [["picture", 300], ["result", 350]]) {
      this.map.createPane(name).style.zIndex = order;
    }
    this.layers = { picture: null, result: null };
    this.points = L.layerGroup().addTo(this.map);
    this.mark = null;
    this.map.on("click", (event) => this._select(event.latlng));
    this.map.on("move zoomend resize", () => this.swipe(this.share || 0));
  }

  /** Replace a layer by a canvas with bounds in the units of the CRS. */
  put(pane, canvas, [west, south, east, north]) {
    this.remove(pane);
    // An SVG overlay takes any element and scales it by its bounds.
    this.layers[pane] = L.svgOverlay(canvas, [[south, west], [north, east]], { pane }).addTo(this.map);
  }

  /** Replace the result by polygons in longitude and latitude. */
  putPolygons(collection, style, describe) {
    this.remove("result");
    this.layers.result = L.geoJSON(collection, {
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
    }).addTo(this.map);
  }

  remove(pane) {
    this.layers[pane]?.remove();
    this.layers[pane] = null;
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
    this.selected(this.projection ? this.projection.toLonLat(latlng.lng, latlng.lat) : null);
  }
}
