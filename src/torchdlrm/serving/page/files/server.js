// The server's answers: GET /schema, POST /predict and POST /explain, with the API key where one is asked for.

let key = null;

/** What the server has refused, in its own words. `status` 0: it could not be reached. */
export class ServerError extends Error {
  constructor(message, status, retryAfterS = 1) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** Send this key from now on. It is kept in a variable: neither storage nor cookies see it. */
export function useKey(text) {
  key = text;
}

/** The model's name and version, the columns of its log and how its lines are written, example rows, and limits. */
export function getSchema() {
  return ask("/schema", { method: "GET" });
}

/** Predictions of rows; `body` is JSON text. */
export function postPredict(body, signal) {
  return ask("/predict", { method: "POST", body, signal, headers: { "Content-Type": "application/json" } });
}

/** Predictions of rows, and what each of their columns adds to them, in log-odds; `body` is JSON text. */
export function postExplain(body, signal) {
  return ask("/explain", { method: "POST", body, signal, headers: { "Content-Type": "application/json" } });
}

/** Whether requests bring a key, which links do not. */
export function hasKey() {
  return key !== null;
}

/** `postPredict` as a command of a shell; the key is named, not shown. */
export function asCurl(body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const authorization = key === null ? "" : ' -H "Authorization: Bearer $DLRM_API_KEY"';
  return `curl ${quoted(`${location.origin}/predict`)} -H 'Content-Type: application/json'${authorization} -d ${quoted(body)}`;
}

/** As `postPredict`; while the server is full it waits as long as the server says, and tells `onWait`. */
export async function postPredictPatiently(body, signal, onWait, tries = 8) {
  for (let left = tries; ; left--) {
    try {
      return await postPredict(body, signal);
    } catch (error) {
      const isBusy = error instanceof ServerError && (error.status === 429 || error.status === 503);
      if (!isBusy || left <= 1) throw error;
      onWait(error.retryAfterS);
      await sleep(error.retryAfterS * 1000, signal);
    }
  }
}

async function ask(path, options) {
  const headers = { Accept: "application/json", ...options.headers };
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  }
  const text = await response.text();
  if (response.ok) return JSON.parse(text);
  const retryAfterS = Math.min(Math.max(Number(response.headers.get("Retry-After")) || 1, 0.1), 10);
  throw new ServerError(reason(text) ?? `The server answers ${response.status}.`, response.status, retryAfterS);
}

function reason(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" && error !== "" ? error : null;
  } catch {
    return null;
  }
}

function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    }, { once: true });
  });
}
