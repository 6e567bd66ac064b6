// What this page, in its frame, knows of TensorBoard around it: dark mode, and the reload button and timer.

/** Follows TensorBoard's own dark mode; alone, or where its page can't be read, the system's. */
export function followTheme(changed) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let around = null;
  try {
    around = window.parent !== window ? window.parent.document.body : null;
  } catch {
    around = null;
  }
  const apply = () => {
    const dark = around ? around.classList.contains("dark-mode") : system.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    changed();
  };
  if (around) new MutationObserver(apply).observe(around, { attributes: true, attributeFilter: ["class"] });
  else system.addEventListener("change", apply);
  apply();
}

/** Calls `reload` whenever TensorBoard has reloaded. */
export function onReload(reload) {
  if (window.parent === window) return;
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    if (message.type === "experimental.DataReloaded") reload();
    channel.port1.postMessage(JSON.stringify({ ...message, payload: null, error: null, isReply: true }));
  };
  window.parent.postMessage("experimental.bootstrap", window.location.origin, [channel.port2]);
}

/** Whether someone can see this page: TensorBoard keeps frames of other tabs, without any size. */
export function seen() {
  return !document.hidden && document.documentElement.clientWidth > 0;
}
