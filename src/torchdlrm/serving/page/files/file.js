// A small file: scores for every row, and how good they are where labels are given.

import { calibrationPlot, element, percent } from "/page/charts.js";
import { count, eventOf, featuresOf, parseLog, rowJson } from "/page/log.js";
import { auc, calibrationBins, logloss, mean } from "/page/metrics.js";
import { postPredictPatiently } from "/page/server.js";

const MAX_FILE_BYTES = 32 * 2 ** 20;
const BATCH_ROWS = 512; // small enough that the bar moves, large enough that the way costs little
const PAGE_ROWS = 50;
const byId = (id) => document.getElementById(id);

/** Sets up the panel; `onError` gets what is not about the file (a missing key). */
export function startFile(schema, onError) {
  const features = featuresOf(schema), event = eventOf(schema);
  const drop = byId("drop");
  let running = new AbortController(), scored = null, page = 0;

  byId("file-hint").textContent =
    "Tabs or commas, plain or gzipped, with or without a header and labels; up to 32 MB. More rows: dlrm predict.";
  byId("file").addEventListener("change", (event) => {
    if (event.target.files.length > 0) score(event.target.files[0]);
    event.target.value = ""; // the same file can be chosen again
  });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length > 0) score(event.dataTransfer.files[0]);
  });
  // Beside the box, a dropped file would replace the page.
  for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
  byId("stop").addEventListener("click", () => running.abort());
  byId("download").addEventListener("click", () => download(scored));
  byId("previous").addEventListener("click", () => drawPage(page - 1));
  byId("next").addEventListener("click", () => drawPage(page + 1));

  async function score(file) {
    running.abort();
    const { signal } = running = new AbortController();
    byId("scores").hidden = true;
    byId("file-error").textContent = "";
    byId("file-note").textContent = `Reading ${file.name}…`;
    byId("file-busy").hidden = false;
    byId("file-progress").value = 0;
    try {
      const log = parseLog(await textOf(file), schema);
      if (log.rows.length === 0) throw new Error(`${file.name} holds no rows.`);
      const note = `${file.name}: ${log.description}`;
      byId("file-note").textContent = note;
      const more = Object.fromEntries((schema.labels ?? []).slice(1).map((label) => [label, []]));
      const predictions = await predictRows(log, signal, note, more);
      scored = { ...log, predictions, more, name: file.name };
      byId("file-note").textContent = note;
      show();
    } catch (error) {
      if (running.signal !== signal) return; // another file has taken its place
      if (error.status === 401) onError(error);
      byId("file-note").textContent = error.name === "AbortError" ? `${file.name}: stopped.` : "";
      byId("file-error").textContent = error.name === "AbortError" ? "" : error.message;
    } finally {
      if (running.signal === signal) byId("file-busy").hidden = true;
    }
  }

  /** Those of the first label; those of others go into `more`, by label. */
  async function predictRows(log, signal, note, more) {
    const predictions = [];
    let batchRows = Math.min(BATCH_ROWS, schema.max_rows);
    const onWait = (waitS) => { byId("file-note").textContent = `${note} · the server is full, trying again in ${waitS} s`; };
    while (predictions.length < log.rows.length) {
      const start = predictions.length, end = Math.min(start + batchRows, log.rows.length);
      const rows = log.rows.slice(start, end).map((row) => rowJson(features, row));
      try {
        const answer = await postPredictPatiently(`{"rows":[${rows.join(",")}]}`, signal, onWait);
        predictions.push(...answer.predictions);
        for (const label of Object.keys(more)) more[label].push(...answer.labels[label]);
      } catch (error) {
        if (error.status === 413 && batchRows > 1) { // rows of this log are longer than the server takes in a request
          batchRows = Math.floor(batchRows / 2);
          continue;
        }
        // The server counts the rows of a request from 0; a reader looks for a line of the file.
        if (error.status) error.message = error.message.replace(/\brow (\d+)\b/, (_, row) => `line ${log.lines[start + Number(row)]}`);
        throw error;
      }
      byId("file-note").textContent = note;
      byId("file-progress").value = predictions.length / log.rows.length;
    }
    return predictions;
  }

  function show() {
    const { labels, predictions } = scored;
    const shown = [["rows", predictions.length.toLocaleString("en")], ["mean prediction", percent(mean(predictions))]];
    byId("calibration").hidden = labels === null;
    if (labels !== null) {
      const judged = [...labels.keys()].filter((i) => labels[i] !== null);
      const truth = judged.map((i) => labels[i]), guesses = judged.map((i) => predictions[i]);
      const area = auc(truth, guesses);
      shown.push(
        [event.rate, percent(mean(truth))],
        ["AUC", Number.isNaN(area) ? "–" : area.toFixed(4), area],
        ["logloss", logloss(truth, guesses).toFixed(4), logloss(truth, guesses)],
      );
      drawCalibration(calibrationBins(truth, guesses), event);
    }
    byId("metrics").replaceChildren(...shown.map(([name, text, value]) => element("div", {},
      element("dt", { textContent: name }),
      element("dd", {}, value === undefined ? text : element("data", { value, textContent: text })))));
    drawPage(0);
    byId("scores").hidden = false;
  }

  function drawPage(number) {
    const { columns, labels, lines, more, predictions, rows } = scored;
    const last = Math.ceil(rows.length / PAGE_ROWS) - 1;
    page = Math.max(0, Math.min(number, last));
    const start = page * PAGE_ROWS, end = Math.min(start + PAGE_ROWS, rows.length);
    const body = element("tbody");
    for (let i = start; i < end; i++) {
      const cells = [
        ...Object.values(more).map((of) => percent(of[i])), ...(labels ? [labels[i] ?? ""] : []),
        ...columns.map((column) => rows[i].get(column.name)),
      ];
      body.append(element("tr", {},
        element("th", { scope: "row", textContent: lines[i] }),
        element("td", { className: "strong" }, element("data", { value: predictions[i], textContent: percent(predictions[i]) })),
        ...cells.map((cell) => element("td", { textContent: cell }))));
    }
    byId("score-table").replaceChildren(
      element("thead", {}, element("tr", {}, ...headOf(scored).map((name) => element("th", { scope: "col", textContent: name })))), body);
    byId("pages").hidden = last === 0;
    byId("page-note").textContent = `${(start + 1).toLocaleString("en")} to ${end.toLocaleString("en")} of ${count(rows.length, "row")}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === last;
  }
}

function drawCalibration(bins, event) {
  byId("calibration-plot").replaceChildren(calibrationPlot(bins, event));
  byId("calibration-events").textContent = event.many;
  byId("calibration-note").textContent =
    `Rows by rising prediction in ${count(bins.length, "bin")} of equal size. On the dashed line the ${event.rate} is ` +
    "as predicted; bars are 95 % intervals.";
  byId("calibration-table").tBodies[0].replaceChildren(...bins.map((bin, i) => element("tr", {},
    element("th", { scope: "row", textContent: i + 1 }),
    ...[bin.rows.toLocaleString("en"), bin.clicks.toLocaleString("en"), percent(bin.predicted), percent(bin.observed)].map(
      (text) => element("td", { textContent: text })))));
}

async function textOf(file) {
  if (file.size > MAX_FILE_BYTES) {
    throw new Error(`${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; this page takes up to 32. For more: dlrm predict.`);
  }
  const head = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  if (head[0] !== 0x1f || head[1] !== 0x8b) return file.text();
  return new Response(file.stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function headOf({ columns, labels, more }) {
  const others = Object.keys(more).map((label) => `prediction_${label}`);
  return ["line", "prediction", ...others, ...(labels ? ["label"] : []), ...columns.map((column) => column.name)];
}

function download(scored) {
  const { columns, labels, lines, more, name, predictions, rows } = scored;
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csv = [headOf(scored).join(",")];
  rows.forEach((row, i) => {
    const cells = columns.map((column) => quoted(row.get(column.name)));
    const probabilities = [predictions[i], ...Object.values(more).map((of) => of[i])];
    csv.push([lines[i], ...probabilities, ...(labels ? [labels[i] ?? ""] : []), ...cells].join(","));
  });
  const address = URL.createObjectURL(new Blob([`${csv.join("\n")}\n`], { type: "text/csv" }));
  element("a", { href: address, download: `${name.replace(/(\.(tsv|csv|txt|gz))+$/i, "")}-scores.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
