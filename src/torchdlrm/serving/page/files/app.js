// Where the page starts: ask the server what it serves, for a key if it wants one, then set up both panels.

import { startFile } from "/page/file.js";
import { modelLine, startRow } from "/page/row.js";
import { getSchema, useKey } from "/page/server.js";

const byId = (id) => document.getElementById(id);
const TABS = ["row", "file"];
let isStarted = false;

async function start() {
  byId("connection-error").textContent = "";
  try {
    const schema = await getSchema();
    byId("key-form").hidden = true;
    byId("model").replaceChildren(...modelLine(schema.model, schema.version, schema.period));
    document.title = `${schema.model} · torchdlrm`;
    byId("main").hidden = false;
    if (!isStarted) {
      isStarted = true;
      startRow(schema, askForKey);
      startFile(schema, askForKey);
    }
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else {
      byId("model").textContent = "no connection";
      byId("connection-error").textContent = error.message;
    }
  }
}

function askForKey(error) {
  byId("key-form").hidden = false;
  byId("model").textContent = "locked";
  if (byId("key").value !== "") byId("connection-error").textContent = error.message;
  byId("key").focus();
}

function select(name, { focus = false } = {}) {
  for (const other of TABS) {
    const tab = byId(`tab-${other}`), isSelected = other === name;
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
    byId(`panel-${other}`).hidden = !isSelected;
    if (isSelected && focus) tab.focus();
  }
  history.replaceState(null, "", name === "row" ? location.pathname : `#${name}`);
}

for (const name of TABS) {
  byId(`tab-${name}`).addEventListener("click", () => select(name));
  byId(`tab-${name}`).addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) select(TABS[(TABS.indexOf(name) + move + TABS.length) % TABS.length], { focus: true });
  });
}
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  start();
});
if (location.hash === "#file") select("file");
start();
