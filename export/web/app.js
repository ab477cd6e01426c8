// The page: loads the bundle beside it, answers as you type, shows what the model looked at.

import * as tokenizers from "./vendor/tokenizers.min.mjs";
import { download, Progress } from "./download.js";
import { showAnswers, showPictures, PictureSheets } from "./show.js";
import { XAdapterError, XAdapterSession } from "./xadapter.js";

const BUNDLE = new URL("bundle/", location.href);
const PICTURES = new URL("pictures/", location.href);
const RUNTIMES = {
  wasm: { module: "./vendor/ort.wasm.min.mjs", core: "ort-wasm-simd-threaded" },
  webgpu: { module: "./vendor/ort.webgpu.min.mjs", core: "ort-wasm-simd-threaded.asyncify" },
};
const TITLES = {
  none: ["Text only", "no expert"],
  v: ["Pictures", "V-expert"],
  t: ["CLIP's text", "T-expert"],
  vt: ["Both", "V- and T-expert"],
};
const COLORS = "black, blue, brown, green, grey, orange, pink, purple, red, white, yellow";
// Beyond this, opening all expert sets to show their answers beside each other costs too much memory.
const COMPARE_UP_TO_BYTES = 64e6;
const SPEAK_AFTER_MS = 700;

const at = (id) => document.getElementById(id);
const bundleUrl = (path, entry) => new URL(entry ? `${path}?sha256=${entry.sha256}` : path, BUNDLE);
let session;
let sheets;
let engine = new URLSearchParams(location.search).get("engine") ?? "wasm";
let asked = 0; // number of the newest question; answers to older ones are dropped
let speaking;

start().catch(showProblem);

async function start() {
  checkBrowser();
  const progress = new Progress(at("loading-bar"), at("loading-text"));
  const read = (path, entry) => download(bundleUrl(path, entry), progress, entry?.size_bytes);
  const [ort, pictures] = await Promise.all([loadRuntime(progress), PictureSheets.load(PICTURES)]);
  sheets = pictures;
  const providers = engine === "webgpu" ? ["webgpu", "wasm"] : ["wasm"];
  session = await XAdapterSession.load({ ort, tokenizers, read, providers });
  await session.open();
  prepareControls();
  await answer(); // the first runs are slow: the browser still compiles
  at("loading").hidden = true;
  at("app").hidden = false;
  await answer();
  keepForOffline().catch((error) => {
    at("offline").textContent = `Not available offline: ${error?.message ?? error}`;
  });
}

/** Say clearly what is missing, before anything is downloaded. */
function checkBrowser() {
  // A function with one SIMD instruction: onnxruntime-web is built with them.
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  if (typeof WebAssembly !== "object") throw new XAdapterError("This browser does not support WebAssembly, or it is turned off.");
  if (!WebAssembly.validate(new Uint8Array(simd))) {
    throw new XAdapterError("This browser is too old for this page: its WebAssembly has no SIMD.");
  }
  if (!["wasm", "webgpu"].includes(engine)) engine = "wasm";
  if (engine === "webgpu" && !navigator.gpu) throw new XAdapterError("This browser does not support WebGPU: remove ?engine=webgpu.");
}

async function loadRuntime(progress) {
  const { module, core } = RUNTIMES[engine];
  const [ort, binary] = await Promise.all([
    import(module),
    download(new URL(`vendor/${core}.wasm`, location.href), progress),
  ]);
  ort.env.wasm.wasmBinary = binary.buffer;
  ort.env.wasm.wasmPaths = { mjs: new URL(`vendor/${core}.mjs`, location.href).href };
  // Threads need a page that is isolated from other origins: two headers of the server (see README.md).
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  return ort;
}

function prepareControls() {
  const { manifest } = session;
  const mask = manifest.plm.mask_token;
  const fills = session.fillsMasks;
  for (const part of document.querySelectorAll(".mask")) part.textContent = mask ?? "";
  if (!fills) {
    document.querySelector("label[for=text]").textContent = "Sentence";
    for (const id of ["insert", "examples", "words"]) at(id).hidden = true;
    document.querySelector("label[for=words]").hidden = true;
  }
  for (const experts of Object.keys(TITLES).filter((name) => session.expertSets.includes(name))) {
    at("experts").append(expertSwitch(experts, experts === manifest.default_expert_set));
  }
  const examples = fills ? [
    [`The color of a banana is ${mask}.`, COLORS],
    [`A strawberry is ${mask}.`, COLORS],
    [`The color of a frog is ${mask}.`, COLORS],
    [`What color is a flamingo? It is ${mask}.`, COLORS],
    [`The ${mask} is in the sky.`, ""],
  ] : [];
  for (const [text, words] of examples) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => {
      at("text").value = text;
      at("words").value = words;
      answer();
    });
    at("examples").append(button);
  }
  [at("text").value, at("words").value] = examples[0] ?? ["", ""];
  at("insert").addEventListener("click", () => {
    const field = at("text");
    field.setRangeText(mask, field.selectionStart, field.selectionEnd, "end");
    field.focus();
    answer();
  });
  for (const id of ["text", "words"]) at(id).addEventListener("input", answer);
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter") event.preventDefault(); // a sentence is one line, however it is broken
  });
  at("experts").addEventListener("change", answer);
  at("credit").textContent = sheets.credit;
  if (navigator.gpu) {
    at("engine-row").hidden = false;
    at("engine").value = engine;
    at("engine").addEventListener("change", () => {
      location.search = at("engine").value === "webgpu" ? "?engine=webgpu" : "";
    });
  }
}

function expertSwitch(experts, checked) {
  const [title, what] = TITLES[experts];
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "experts", value: experts, checked });
  const parts = [["b", title], ["small", what], ["output", ""]].map(([tag, textContent]) =>
    Object.assign(document.createElement(tag), { textContent }),
  );
  parts[2].id = `best-${experts}`;
  label.append(input, ...parts);
  return label;
}

const chosenExperts = () => document.querySelector("input[name=experts]:checked").value;

async function answer() {
  const number = ++asked;
  const experts = chosenExperts();
  const text = at("text").value;
  const candidates = at("words").value.split(",").map((word) => word.trim()).filter(Boolean);
  let result;
  try {
    result = await session.answer(text, { experts, candidates });
  } catch (error) {
    if (number !== asked) return;
    showHint(error);
    clearAnswer();
    return;
  }
  if (number !== asked) return;
  showHint(null);
  showAnswers(at("answers"), result.answers);
  at("answers").dataset.text = text;
  showPictures(at("pictures"), result.pictures, sheets);
  at("no-pictures").hidden = result.pictures.length > 0;
  at("no-pictures").textContent = `With “${TITLES[experts][0]}”, it looks at no pictures.`;
  showFacts(result.milliseconds, experts);
  speak(result);
  try {
    await compare(number, text, candidates, experts, result);
  } catch (error) {
    if (number === asked) showHint(error);
  }
}

/** Show in every switch what its expert set answers. */
async function compare(number, text, candidates, experts, result) {
  const show = (name, answers) => {
    at(`best-${name}`).textContent = answers.map((ofMask) => ofMask[0].word).join(", ");
  };
  show(experts, result.answers);
  const bytes = session.variant(experts).size_bytes;
  if (bytes > COMPARE_UP_TO_BYTES) return;
  for (const other of session.expertSets.filter((name) => name !== experts)) {
    const { answers } = await session.answer(text, { experts: other, candidates, topK: 1 });
    if (number !== asked) return;
    show(other, answers);
  }
  at("experts").dataset.text = text;
}

/** Leave nothing of an older answer: it is not the answer to what is written now. */
function clearAnswer() {
  clearTimeout(speaking);
  for (const id of ["answers", "pictures", "facts", "spoken"]) at(id).replaceChildren();
  for (const best of document.querySelectorAll(".experts output")) best.textContent = "";
  at("no-pictures").hidden = true;
  delete at("answers").dataset.text;
  delete at("experts").dataset.text;
}

function showHint(error) {
  at("hint").textContent = error?.message ?? "";
  const wrong = error && (error.field ?? "text");
  for (const id of ["text", "words"]) at(id).setAttribute("aria-invalid", wrong === id ? "true" : "false");
  if (error && !(error instanceof XAdapterError)) showProblem(error);
}

function showFacts(milliseconds, experts) {
  const { target, precision, size_bytes: size } = session.variant(experts);
  const threads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const runs = engine === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  at("facts").textContent =
    `Answered in ${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms (${runs}; ${target}-${precision}, ${(size / 1e6).toFixed(1)} MB).`;
  at("facts").dataset.milliseconds = milliseconds;
}

/** Tell a screen reader the outcome once the typing rests. */
function speak({ answers, pictures }) {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const best = answers.map(([first]) => `${first.word}, ${Math.round(100 * first.score)} percent`).join("; ");
    const seen = pictures.map((picture) => picture.caption).join(", ");
    at("spoken").textContent = `Answer: ${best}.${seen ? ` Pictures: ${seen}.` : ""}`;
  }, SPEAK_AFTER_MS);
}

/** Keep what was loaded, so that the page starts again without a network. */
async function keepForOffline() {
  if (!navigator.serviceWorker) return; // a page over plain http
  sheets.prefetch();
  await navigator.serviceWorker.register("offline.js", { type: "module" });
  await navigator.serviceWorker.ready;
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  const cache = await caches.open("xadapter");
  const variants = session.expertSets.map((experts) => session.variant(experts)); // some are not open yet
  const graphs = variants.flatMap(({ file, weight_files: weightFiles }) => [file, ...weightFiles]);
  const bundle = graphs.map((path) => bundleUrl(path, session.manifest.files[path]));
  const urls = [location.pathname, ...loaded, ...sheets.urls, ...bundle].map((url) => new URL(url, location.href));
  const missing = [];
  for (const { href, origin } of urls) {
    if (origin === location.origin && !(await cache.match(href))) missing.push(href);
  }
  await cache.addAll([...new Set(missing)]);
  at("offline").textContent = "Saved in this browser: the page now works offline.";
}

function showProblem(error) {
  at("loading").hidden = true;
  at("problem").hidden = false;
  const known = error instanceof XAdapterError;
  at("problem").textContent = known ? error.message : `This page cannot run here: ${error?.message ?? error}`;
  if (!known) console.error(error);
}
