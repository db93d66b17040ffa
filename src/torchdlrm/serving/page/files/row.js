// One row: fields to edit, its probability, and which columns moved it.

import { bar, element, percent, points } from "/page/charts.js";
import { cellText, eventOf, featuresOf, parseLog, rowJson } from "/page/log.js";
import { asCurl, hasKey, postExplain } from "/page/server.js";

const NUM_SHOWN = 12;
const PAUSE_MS = 180; // after the last key stroke: typing a number asks once
const byId = (id) => document.getElementById(id);

/** Sets up the panel; `onError` gets what is not about the row (a missing key). */
export function startRow(schema, onError) {
  const features = featuresOf(schema), event = eventOf(schema);
  const fields = new Map();
  const form = byId("row-form");
  let running = new AbortController(), timer = 0, showsAll = false, contributions = [];

  const groups = [["dense", "Dense", "number", "numbers"], ["vector", "Content", "vector", "vectors"], ["sparse", "Sparse", "category", "categories"]];
  for (const [group, title, one, many] of groups) {
    const columns = features.filter((column) => (column.size ? "vector" : column.role) === group);
    const grid = element("div", { className: `fields ${group}` });
    for (const column of columns) grid.append(makeField(column, fields));
    if (columns.length > 0 || group !== "vector") byId("fields").append(element("fieldset", {},
      element("legend", {}, title, element("span", {}, ` ${columns.length} ${columns.length === 1 ? one : many}`)), grid));
  }
  schema.examples.forEach((example, i) => {
    const button = element("button", { type: "button", textContent: `Example ${i + 1}` });
    const cells = new Map(features.map((c) => [c.name, cellText(c, example[c.name])]));
    button.addEventListener("click", () => fill(cells, schema.unknown[i]));
    byId("examples").append(button);
  });
  byId("paste-hint").textContent = pasteHint(schema, features);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    predict();
  });
  byId("examples-note").hidden = schema.examples.length === 0;
  byId("fields").addEventListener("input", (event) => {
    markUnknown(event.target, false);
    clearTimeout(timer);
    timer = setTimeout(predict, PAUSE_MS);
  });
  byId("clear").addEventListener("click", () => fill(new Map()));
  byId("answer-title").textContent = `Probability of ${event.one}`;
  byId("api").hidden = hasKey();
  byId("copy-curl").addEventListener("click", copyCurl);
  byId("paste").addEventListener("input", (event) => paste(event.target.value));
  byId("all-contributions").addEventListener("click", () => {
    showsAll = !showsAll;
    drawContributions();
  });
  const first = byId("examples").firstElementChild;
  if (first) first.click();
  else predict();

  /** Shows the request of this row as a command of a shell; where the browser allows it, it is copied too. */
  async function copyCurl() {
    const shown = byId("curl");
    shown.value = asCurl(`[${rowJson(features, new Map([...fields].map(([name, input]) => [name, input.value])))}]`);
    shown.hidden = false;
    shown.select();
    await navigator.clipboard?.writeText(shown.value).then(() => { byId("copy-curl").textContent = "Copied"; }, () => {});
    setTimeout(() => { byId("copy-curl").textContent = "Copy as curl"; }, 2000);
  }

  function paste(text) {
    const note = byId("paste-note");
    note.className = "note";
    note.textContent = "";
    if (text.trim() === "") return;
    try {
      const log = parseLog(text, schema);
      if (log.rows.length === 0) throw new Error("There is a header, but no line after it.");
      fill(log.rows[0]);
      const label = log.labels?.[0] ?? null;
      const told = label === null ? "" : ` Its label says: ${label === 1 ? event.yes : event.no}.`;
      note.textContent = log.rows.length > 1 ? `Filled in the first of ${log.rows.length} lines.${told}` : `Filled in.${told}`;
    } catch (error) {
      note.textContent = error.message;
      note.className = "note error";
    }
  }

  /** `unknown`: names of features whose value is not in the vocabulary. */
  function fill(row, unknown = []) {
    for (const [name, input] of fields) {
      input.value = row.get(name) ?? "";
      markUnknown(input, unknown.includes(name));
    }
    predict();
  }

  async function predict() {
    clearTimeout(timer);
    running.abort();
    const { signal } = running = new AbortController();
    const row = new Map([...fields].map(([name, input]) => [name, input.value]));
    byId("curl").hidden = true; // it would be another row's
    byId("answer").setAttribute("aria-busy", "true");
    try {
      const { explanations: [answer], model, version, period } = await postExplain(`[${rowJson(features, row)}]`, signal);
      byId("model").replaceChildren(...modelLine(model, version, period));
      showProbability(answer.prediction, event);
      const [, ...others] = Object.entries(answer.labels ?? {});
      byId("labels").textContent = others.map(([name, probability]) => `${name}: ${percent(probability)}`).join(" · ");
      contributions = Object.entries(answer.contributions).map(([name, adds]) => ({
        name, value: row.get(name), difference: answer.prediction - 1 / (1 + Math.exp(adds - answer.logit)),
      }));
      contributions.sort((a, b) => Math.abs(b.difference) - Math.abs(a.difference));
      showError("");
      drawContributions();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 401) onError(error);
      showProbability(null, event);
      byId("labels").textContent = "";
      showError(error.message);
      contributions = [];
      drawContributions();
    } finally {
      if (!signal.aborted) byId("answer").removeAttribute("aria-busy");
    }
  }

  function showError(text) {
    byId("row-error").textContent = text;
    const words = new Set(text.match(/[A-Za-z_][A-Za-z0-9_]*/g));
    for (const [name, input] of fields) input.setAttribute("aria-invalid", String(words.has(name)));
  }

  function drawContributions() {
    byId("why").hidden = contributions.length === 0;
    const least = Math.min(0, ...contributions.map(({ difference }) => difference));
    const most = Math.max(0, ...contributions.map(({ difference }) => difference));
    const shown = showsAll ? contributions : contributions.slice(0, NUM_SHOWN);
    byId("contributions").tBodies[0].replaceChildren(...shown.map(({ name, value, difference }) => element("tr", {},
      element("th", { scope: "row", textContent: name, title: name }),
      element("td", { textContent: value, title: value, className: "value" }),
      element("td", {}, bar(difference, least, most)),
      element("td", { className: "num" }, element("data", { value: difference, textContent: points(difference) })))));
    const button = byId("all-contributions");
    button.hidden = contributions.length <= NUM_SHOWN;
    button.textContent = showsAll ? "Show fewer" : `Show all ${contributions.length}`;
  }
}

/** "model name · version" for the head of the page, with the period that the model has learnt up to, if it has one. */
export function modelLine(model, version, period) {
  const line = [element("b", { textContent: model }), element("span", { textContent: version, title: "version of the bundle" })];
  if (period !== undefined) line.push(element("span", { textContent: `period ${period}`, title: "what it has learnt up to" }));
  return line;
}

function markUnknown(input, isUnknown) {
  input.toggleAttribute("data-unknown", isUnknown);
  input.setAttribute("aria-description", isUnknown ? "unknown to the model" : "");
}

function makeField(column, fields) {
  const input = element(column.size ? "textarea" : "input", {
    id: `field-${column.name}`, placeholder: column.never_missing ? "the mean" : "missing", spellcheck: false, autocomplete: "off",
    inputMode: column.kind === "float" ? "decimal" : "text",
  });
  let hint = column.size ? `a list of ${column.size} numbers` : column.value_separator ? `${column.kind}, values between “${column.value_separator}”` : column.kind;
  if (column.never_missing) hint += ", never missing in training: the mean stands for it";
  input.title = hint ?? "";
  fields.set(column.name, input);
  const label = element("label", { textContent: column.size ? `${column.name}, ${column.size} numbers` : column.name, title: `${column.name}: ${hint}` });
  label.htmlFor = input.id;
  return element("div", { className: column.size ? "field whole" : column.value_separator ? "field long" : "field" }, label, input);
}

function pasteHint(schema, features) {
  const names = { "\t": "tabs", ",": "commas", ";": "semicolons" };
  const between = names[schema.separator] ?? `“${schema.separator}”`;
  return schema.columns.length === features.length
    ? `${features.length} cells between ${between}. It fills the fields below.`
    : `${schema.columns.length} cells between ${between}, or the ${features.length} features alone. It fills the fields below.`;
}

function showProbability(probability, event) {
  const shown = byId("probability");
  if (probability === null) {
    shown.textContent = "–";
    byId("odds").textContent = "";
    return;
  }
  shown.replaceChildren(element("data", { value: probability, textContent: percent(probability) }));
  const oneIn = 1 / probability;
  byId("odds").textContent = probability > 0 && probability < 0.5
    ? `about ${event.inOne} in ${oneIn >= 9.5 ? Math.round(oneIn).toLocaleString("en") : oneIn.toFixed(1)}` : "";
}
