/** Requests to the service. Paths are relative to the page, so that a root path is kept. */

const KEY = "pimc-api-key";

/** A problem document (RFC 9457) of the service, or a failed connection. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `The service returned status ${status}.`);
    this.status = status;
    this.code = document.code || "";
    this.title = document.title || "The request failed";
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY) || "";
}

let openDialog = null;

/**
 * Open the dialog for the API key. Resolves to whether a key was entered. Callers share one open
 * dialog, so that a second one does not overwrite a key that is being typed.
 */
export function requestKey(reason) {
  openDialog ??= openKeyDialog(reason).finally(() => { openDialog = null; });
  return openDialog;
}

function openKeyDialog(reason) {
  const dialog = document.getElementById("key-dialog");
  const input = document.getElementById("key");
  if (reason) document.getElementById("key-reason").textContent = reason;
  input.value = storedKey();
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "key" && input.value;
      if (given) sessionStorage.setItem(KEY, input.value);
      resolve(Boolean(given));
    }, { once: true });
  });
}

export function keyHeaders() {
  const key = storedKey();
  return key ? { "X-API-Key": key } : {};
}

/** The address of a path of the service. */
export function address(path) {
  return new URL(path, document.baseURI.split(/[?#]/)[0]).href;
}

/**
 * Send a request; if the service requires a key, request one from the user and repeat.
 *
 * @param {string} path relative to the service's root
 * @param {{method?: string, headers?: object, body?: any, progress?: (share: number) => void,
 *          signal?: AbortSignal}} how
 * @returns {Promise<{status: number, blob: Blob}>}
 * @throws {Problem} for every status from 400 on, and if the service cannot be reached
 */
export async function send(path, how = {}) {
  for (;;) {
    const key = storedKey();
    const response = await once(path, how);
    if (response.status < 400) return response;
    const problem = new Problem(response.status, await parsed(response.blob));
    // After the last await before the dialog: the refused key may be replaced during each of them.
    if (response.status === 401 && storedKey() !== key) continue;
    const reason = storedKey() ? "The service does not accept this key." : "This service requires an API key.";
    if (response.status !== 401 || !(await requestKey(reason))) throw problem;
  }
}

/** The JSON document that a path returns. */
export async function json(path, how = {}) {
  const headers = { Accept: "application/json", ...how.headers };
  return JSON.parse(await (await send(path, { ...how, headers })).blob.text());
}

async function parsed(blob) {
  try {
    return JSON.parse(await blob.text());
  } catch {
    return {};
  }
}

// XMLHttpRequest, because fetch does not report the progress of an upload.
function once(path, { method = "GET", headers = {}, body = null, progress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, address(path));
    request.responseType = "blob";
    for (const [name, value] of Object.entries({ ...keyHeaders(), ...headers })) {
      request.setRequestHeader(name, value);
    }
    if (progress) {
      request.upload.onprogress = (event) => {
        if (event.lengthComputable) progress(event.loaded / event.total);
      };
    }
    request.onload = () => resolve({ status: request.status, blob: request.response });
    request.onerror = () => reject(new Problem(0, {
      title: "Connection lost",
      detail: "The service cannot be reached. A run that was accepted continues: reload the page to find it under Runs.",
    }));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    request.send(body);
  });
}
