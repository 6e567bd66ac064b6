// What the plugin sends, see payload.py and plugin.py.

const PATIENCE = 120000;

async function ask(address, parameters = {}) {
  const url = new URL(address, import.meta.url);
  for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
  const answer = await fetch(url, { signal: AbortSignal.timeout(PATIENCE) });
  if (answer.ok) return answer;
  let why = `${answer.status}`;
  try {
    why = (await answer.json()).error ?? why;
  } catch {
    // a proxy's page: the status says enough
  }
  throw Object.assign(new Error(why), { status: answer.status });
}

/** Arrays by name: { values: Float64Array, taken: Uint8Array, rows, columns }. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const found = new Map();
  let offset = 4 + length;
  for (const [name, rows, columns] of header) {
    const size = rows * columns;
    const values = new Float64Array(buffer, offset, size);
    const taken = new Uint8Array(buffer, offset + 8 * size, size);
    found.set(name, { values, taken, rows, columns });
    offset += 9 * size + ((8 - (size % 8)) % 8);
  }
  return found;
}

export const fetchRuns = async () => (await ask("./runs")).json();
export const fetchRun = async (run) => (await ask("./run", { run })).json();

const kept = new Map();
const KEPT = 24;

async function block(address, parameters) {
  const key = JSON.stringify([address, parameters]);
  if (!kept.has(key)) {
    const found = unpack(await (await ask(address, parameters)).arrayBuffer());
    kept.set(key, found);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  }
  return kept.get(key);
}

/** One metric at its sites: rows are `about.metrics[metric].sites`, columns edits. */
export async function fetchMetric(about, metric) {
  return (await block("./values", { run: about.id, version: about.version, metric })).get("values");
}

/** All metrics at one site: by the metric's number; rows are edits. */
export async function fetchSite(about, site) {
  const parts = await block("./site", { run: about.id, version: about.version, site });
  return new Map([...parts].map(([metric, part]) => [Number(metric), part]));
}
