// Service worker: the network first, what was kept where there is none. A file that is asked for by its hash
// cannot change, so it comes from what was kept.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});

async function answer(event) {
  const { request } = event;
  let cache, kept;
  try {
    cache = await caches.open("xadapter");
    kept = await cache.match(request);
  } catch {
    return fetch(request); // the browser keeps nothing: the page works all the same
  }
  if (kept && isHashed(request)) return kept;
  let fresh;
  try {
    fresh = await fetch(request);
  } catch (error) {
    const other = kept ?? (request.mode === "navigate" ? await cache.match(request, { ignoreSearch: true }) : null);
    if (other) return other;
    throw error;
  }
  const unchanged = kept && version(fresh) !== null && version(kept) === version(fresh);
  if (fresh.status === 200 && !unchanged) {
    event.waitUntil(keep(cache, request, fresh.clone()).catch((error) => {
      // No room: what is left is of an older page, and this one must not believe that it has it.
      if (error.name === "QuotaExceededError") return cache.delete(request);
    }));
  }
  return fresh;
}

async function keep(cache, request, response) {
  const older = isHashed(request) ? await cache.keys(request, { ignoreSearch: true }) : [];
  await Promise.all(older.filter(({ url }) => url !== request.url).map((other) => cache.delete(other)));
  await cache.put(request, response);
}

const isHashed = ({ url }) => new URL(url).searchParams.has("sha256");
const version = ({ headers }) => headers.get("etag") ?? headers.get("last-modified");
