/** Own classes: a model fitted to points that are labelled on the map (`POST /heads`). */

import { send } from "./api.js";
import { formOf } from "./stack.js";

const PALETTE = ["#e6550d", "#3182bd", "#31a354", "#756bb1", "#fdd049", "#de2d86", "#00a5a5", "#8c6d31"];

/** The form of own classes. */
export class Teacher {
  /**
   * @param {HTMLElement} body where the form goes
   * @param {{addPoint: (lonLat: number[], colour: string, name: string) => () => void,
   *          files: () => {name: string, file: File}[], taught: (model: string) => void,
   *          failed: (error: Error) => void,
   *          warnings: (list: {code: string, detail: string}[]) => Node[]}} page
   */
  constructor(body, page) {
    this.body = body;
    this.page = page;
    this.labels = [];
    body.innerHTML = `
      <p class="hint">Name a class, switch labelling on, and click pixels of the class on the map: at least two classes with five pixels each, spread over the area.</p>
      <label>Class <input type="text" id="class-name" list="class-names" autocomplete="off"></label>
      <datalist id="class-names"></datalist>
      <label><input type="checkbox" id="labelling"> Label selected pixels</label>
      <table id="label-counts"></table>
      <label>Name of the model <input type="text" id="head-name" value="my-classes" pattern="[a-z0-9][a-z0-9-]*"></label>
      <p class="buttons">
        <button type="button" id="teach-run" class="primary">Teach</button>
        <button type="button" id="label-undo">Remove the last label</button>
      </p>
      <div id="teach-score" role="status"></div>`;
    this.part = (id) => body.querySelector(`#${id}`);
    this.part("teach-run").addEventListener("click", () => this._teach());
    this.part("label-undo").addEventListener("click", () => this._undo());
    this._show();
  }

  /** Label a selected pixel. Returns whether it was labelled. */
  take(lonLat) {
    const name = this.part("class-name").value.trim();
    if (!this.part("labelling").checked || !name) return false;
    const remove = this.page.addPoint(lonLat, this._colour(name), name);
    this.labels.push({ name, lonLat, remove });
    this._show();
    return true;
  }

  _colour(name) {
    const names = [...new Set([...this.labels.map((label) => label.name), name])];
    return PALETTE[names.indexOf(name) % PALETTE.length];
  }

  _undo() {
    this.labels.pop()?.remove();
    this._show();
  }

  _show() {
    const counts = new Map();
    for (const { name } of this.labels) counts.set(name, (counts.get(name) || 0) + 1);
    const table = this.part("label-counts");
    table.textContent = "";
    for (const [name, count] of counts) {
      const row = table.insertRow();
      row.insertCell().textContent = name;
      const cell = row.insertCell();
      cell.className = "number";
      cell.textContent = count;
    }
    this.part("class-names").replaceChildren(...[...counts.keys()].map((name) => new Option(name)));
    this.part("label-undo").disabled = !this.labels.length;
    this.part("teach-run").disabled = counts.size < 2 || !this.page.files().length;
  }

  async _teach() {
    const name = this.part("head-name").value.trim();
    const labels = {
      type: "FeatureCollection",
      features: this.labels.map((label) => ({
        type: "Feature",
        geometry: { type: "Point", coordinates: label.lonLat },
        properties: { class: label.name },
      })),
    };
    const score = this.part("teach-score");
    score.textContent = "The service is fitting the model…";
    this.part("teach-run").disabled = true;
    try {
      const form = formOf(this.page.files(), { name, labels: JSON.stringify(labels) });
      const response = await send("heads", { method: "POST", body: form, headers: { Accept: "application/json" } });
      const { card, warnings } = JSON.parse(await response.blob.text());
      const { macro_f1: f1, macro_f1_interval: interval, n, places } = card.metrics;
      // Labels of a single place have no interval by place.
      const range = interval ? ` (95 % interval ${interval.map((end) => end.toFixed(2)).join(" to ")})` : "";
      score.textContent = `'${card.name}' is ready: macro-F1 ${f1.toFixed(2)}${range} `
        + `on ${card.metrics.split}; ${n} pixels tested, ${places} ${places === 1 ? "place" : "places"}. To map the area, select it under Model and choose Run.`;
      score.append(...this.page.warnings(warnings));
      this.page.taught(card.name);
    } catch (error) {
      score.textContent = "";
      this.page.failed(error);
    } finally {
      this._show();
    }
  }
}
