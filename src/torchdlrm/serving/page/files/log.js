// Text of a log -> rows. Cells stay text: what is a number is for the server to say, and no digit gets lost on the way.

const NUMBER = String.raw`-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?`, LIST = `\\[\\s*${NUMBER}(\\s*,\\s*${NUMBER})*\\s*\\]`;
const AS_WRITTEN = { int: new RegExp(`^${NUMBER}$`), float: new RegExp(`^${NUMBER}$`), vector: new RegExp(`^${LIST}$`) };
const SEPARATOR_NAMES = { "\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", " ": "spaces" };

/** Text that is no row of this log; the message says which line and why. */
export class LogError extends Error {}

/** The columns that the model reads. */
export function featuresOf(schema) {
  return schema.columns.filter((column) => column.role === "dense" || column.role === "sparse");
}

/** The column of the label that predictions are judged by: the first of several. */
const labelOf = ({ columns, labels }) => columns.find(({ name, role }) => role === "label" && (labels ?? [name])[0] === name);

/** What the model predicts: one of it, several, and its rate. A label that is not called a click has its own name. */
export function eventOf(schema) {
  const label = labelOf(schema);
  if (!label || /^(label|clicks?|clicked|is_?click(ed)?)$/i.test(label.name)) {
    return { one: "a click", inOne: "one click", many: "clicks", rate: "click rate", yes: "clicked", no: "not clicked" };
  }
  const name = `“${label.header_name ?? label.name}”`;
  return { one: name, inOne: `one ${name}`, many: name, rate: `rate of ${name}`, yes: name, no: `not ${name}` };
}

/** A cell of an example row as text. */
export function cellText(column, value) {
  if (value === null || value === undefined) return "";
  if (column.size) return JSON.stringify(value);
  return Array.isArray(value) ? value.join(column.value_separator ?? ",") : String(value);
}

/** A row (a Map from column name to text) as JSON text; what is empty is missing and left out. */
export function rowJson(columns, row) {
  const members = [];
  for (const column of columns) {
    const text = row.get(column.name) ?? "";
    if (text !== "") members.push(`${JSON.stringify(column.name)}:${cellJson(column, text)}`);
  }
  return `{${members.join(",")}}`;
}

function cellJson(column, text) {
  if (column.value_separator) {
    const values = text.split(column.value_separator).filter((value) => value !== ""); // as preprocessing does
    return `[${values.map((value) => valueJson(column, value)).join(",")}]`;
  }
  return valueJson(column, text);
}

function valueJson(column, text) {
  // As written: Number() would round integers beyond 2^53.
  return AS_WRITTEN[column.kind]?.test(text) ? text : JSON.stringify(text);
}

/**
 * Rows of a log's text, with or without a header, with or without labels, in the log's own order of columns.
 *
 * Returns {columns, rows: [Map], lines: [number], labels: [0 | 1 | null] | null, description}.
 */
export function parseLog(text, schema) {
  const start = text.charCodeAt(0) === 0xfeff ? 1 : 0;
  const lineEnd = text.search(/[\r\n]/);
  const firstLine = text.slice(start, lineEnd < 0 ? undefined : lineEnd);
  if (firstLine.trim() === "") throw new LogError("There is nothing in the first line.");
  const layout = findLayout(firstLine, schema);
  const records = split(text.slice(start), layout.separator, layout.quote);
  if (layout.hasHeader) records.shift();
  const label = labelOf(schema), labelAt = layout.columns.findIndex((column) => label && column === label);
  const rows = [], lines = [], labels = [];
  for (const { cells, line } of records) {
    if (cells.length !== layout.columns.length) {
      throw new LogError(`Line ${line} has ${count(cells.length, "cell")}; the first has ${layout.columns.length}.`);
    }
    const row = new Map();
    layout.columns.forEach((column, i) => {
      if (column?.role === "dense" || column?.role === "sparse") row.set(column.name, cells[i]);
    });
    rows.push(row);
    lines.push(line);
    if (labelAt >= 0) labels.push(parseLabel(cells[labelAt].trim(), layout.columns[labelAt], line));
  }
  const columns = layout.columns.filter((column) => column?.role === "dense" || column?.role === "sparse");
  const hasLabels = labels.some((label) => label !== null);
  return { columns, rows, lines, labels: hasLabels ? labels : null, description: describe(layout, rows, labels) };
}

function describe(layout, rows, labels) {
  const parts = [
    count(rows.length, "row"),
    `cells between ${SEPARATOR_NAMES[layout.separator] ?? JSON.stringify(layout.separator)}`,
    layout.hasHeader ? "a header" : "no header",
  ];
  const labelled = labels.filter((label) => label !== null).length;
  parts.push(labelled === 0 ? "no labels" : labelled === rows.length ? "labels" : `labels in ${labelled} rows`);
  if (layout.unknown.length) parts.push(`not used: ${layout.unknown.join(", ")}`);
  return parts.join(" · ");
}

function findLayout(firstLine, schema) {
  const byName = new Map();
  for (const column of schema.columns) {
    byName.set(column.name, column);
    if (column.header_name) byName.set(column.header_name, column);
  }
  const features = featuresOf(schema);
  const label = labelOf(schema);
  const orders = [schema.columns, schema.columns.filter((column) => column.role !== "label"), features];
  if (label) orders.push([label, ...features]);
  const separators = [...new Set([schema.separator ?? "\t", "\t", ",", ";", "|"])];
  for (const separator of separators) {
    const quote = separator === "\t" ? schema.quote ?? null : '"';
    const cells = split(firstLine, separator, quote)[0].cells.map((cell) => cell.trim());
    const known = cells.filter((cell) => byName.has(cell));
    if (known.length > cells.length / 2 || (known.length > 0 && known.length === cells.length)) {
      const columns = cells.map((cell) => byName.get(cell));
      const unknown = cells.filter((cell) => !byName.has(cell) || ![label, ...features].includes(byName.get(cell)));
      return { separator, quote, columns, unknown, hasHeader: true };
    }
    const order = orders.find((columns) => columns.length === cells.length);
    if (order && cells.length > 1) return { separator, quote, columns: order, unknown: [], hasHeader: false };
  }
  const separator = separators[0];
  const found = split(firstLine, separator, null)[0].cells.length;
  throw new LogError(
    `The first line has ${count(found, "cell")} between ${SEPARATOR_NAMES[separator] ?? separator}. A line of this ` +
    `model's log has ${schema.columns.length}, or ${features.length} without ` +
    `${schema.columns.length === features.length + 1 ? "the label" : "label and unused columns"}; ` +
    "with a header that names them, any columns in any order.",
  );
}

/** Records of cells with the line each begins in; empty lines at the end are not records. */
function split(text, separator, quote) {
  const records = [];
  let cells = [], cell = "", line = 1, begins = 1, at = 0;
  const close = () => {
    cells.push(cell);
    if (cells.length > 1 || cells[0] !== "") records.push({ cells, line: begins });
    cells = [];
    cell = "";
  };
  while (at < text.length) {
    if (quote !== null && text[at] === quote && cell === "") {
      const startLine = line;
      for (at++; ; at++) {
        if (at >= text.length) throw new LogError(`Line ${startLine}: a quoted cell is not closed.`);
        if (text[at] === quote && text[at + 1] !== quote) break;
        if (text[at] === quote) at++;
        if (text[at] === "\n") line++;
        cell += text[at];
      }
      at++;
    } else if (text[at] === separator) {
      cells.push(cell);
      cell = "";
      at++;
    } else if (text[at] === "\n" || text[at] === "\r") {
      if (text[at] === "\r" && text[at + 1] === "\n") at++;
      close();
      at++;
      begins = ++line;
    } else {
      // A run of plain text at once: character by character, a file of some megabytes takes seconds.
      let end = at + 1;
      while (end < text.length && text[end] !== separator && text[end] !== "\n" && text[end] !== "\r") end++;
      cell += text.slice(at, end);
      at = end;
    }
  }
  if (cells.length > 0 || cell !== "") close();
  return records;
}

function parseLabel(text, column, line) {
  if (text === "" || column.null_values?.includes(text)) return null;
  const value = labelNumber(text);
  const isOneOf = (values) => values.some((other) => other === text || labelNumber(other) === value);
  const threshold = column.threshold ?? null;
  if (column.positive) {
    if (isOneOf(column.positive)) return 1;
    if (!column.negative || isOneOf(column.negative)) return 0;
  } else if (threshold !== null && !Number.isNaN(value)) {
    return value >= threshold ? 1 : 0;
  } else if (value === 0 || value === 1) {
    return value;
  }
  throw new LogError(`Line ${line}: the label ${JSON.stringify(text)} means neither 0 nor 1.`);
}

function labelNumber(text) {
  const lower = text.toLowerCase();
  return lower === "true" ? 1 : lower === "false" ? 0 : Number(lower);
}

/** "1 row", "2,000 rows". */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}
