// Downloads with progress.

import { XAdapterError } from "./xadapter.js";

/** Shows how much of all downloads has come. */
export class Progress {
  #bar;
  #text;
  #loaded = 0;
  #total = 0;

  constructor(bar, text) {
    this.#bar = bar;
    this.#text = text;
  }

  expect(bytes) {
    this.#total += bytes;
    this.#show();
  }

  add(bytes) {
    this.#loaded += bytes;
    this.#show();
  }

  #show() {
    const total = Math.max(this.#loaded, this.#total);
    this.#bar.max = total || 1;
    this.#bar.value = this.#loaded;
    this.#text.textContent =
      this.#loaded < total
        ? `Loading: ${(this.#loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`
        : "Starting the model";
  }
}

/**
 * The bytes of a file.
 *
 * @param {URL} url
 * @param {Progress} progress
 * @param {number} [size] Its size; what the server says if left out.
 * @returns {Promise<Uint8Array<ArrayBuffer>>}
 */
export async function download(url, progress, size) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new XAdapterError(`${url.pathname} cannot be loaded: is there a network?`);
  }
  if (!response.ok) throw new XAdapterError(`${url.pathname} cannot be loaded: the server says ${response.status}.`);
  const encoded = response.headers.has("content-encoding"); // then its length is that of the compressed file
  progress.expect(size ?? (encoded ? 0 : Number(response.headers.get("content-length") ?? 0)));
  const chunks = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    length += value.length;
    progress.add(value.length);
  }
  const bytes = new Uint8Array(length);
  let offset = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, offset);
    offset += chunk.length;
  }
  return bytes;
}
