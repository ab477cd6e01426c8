// Service worker: the network first, what was kept where there is none. A file that is asked for by its hash
// cannot change, so it comes from what was kept.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open("xadapter");
  const kept = await cache.match(request);
  const url = new URL(request.url);
  if (kept && url.searchParams.has("sha256")) return kept;
  let fresh;
  try {
    fresh = await fetch(request);
  } catch (error) {
    const other = kept ?? (request.mode === "navigate" ? await cache.match(request, { ignoreSearch: true }) : null);
    if (other) return other;
    throw error;
  }
  const unchanged = kept && kept.headers.get("last-modified") === fresh.headers.get("last-modified");
  if (fresh.status === 200 && !unchanged) {
    await cache.delete(request, { ignoreSearch: url.searchParams.has("sha256") }); // an older version of the file
    await cache.put(request, fresh.clone());
  }
  return fresh;
}
