"use strict";

const make = (tag, facts = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), facts);
  element.append(...inside);
  return element;
};

// Sorting: a button in each header. Numbers go by their data-value, texts as people read them;
// what is missing comes last either way.
const read = (row, place) => {
  const cell = row.cells[place];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim().replace(/(\d),(?=\d{3})/g, "$1");
  return text.startsWith("-") && !/\d/.test(text) ? null : text;
};
const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
};
const sort = (table, head) => {
  const isDown = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  const keyed = [...table.tBodies[0].rows].map((row) => [read(row, head.cellIndex), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return isDown ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
};

// Filtering: rows that hold every word.
const filter = (table, input, count) => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const left = rows.filter((row) => !row.hidden).length;
  count.textContent = left === rows.length ? `${left} rows` : `${left} of ${rows.length} rows`;
};

for (const table of document.querySelectorAll("table[data-table]")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const head of table.tHead.rows[0].cells) {
    head.setAttribute("aria-sort", "none");
    const button = make("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
  const input = make("input", { type: "search", autocomplete: "off" });
  const count = make("output");
  input.addEventListener("input", () => filter(table, input, count));
  filter(table, input, count);
  const bar = make("div", { className: "bar" }, make("label", {}, "Filter ", input), count);
  table.closest(".wide").before(bar);
}

// Runs: each number opens the list of those it came from.
const { store, groups, runs } = JSON.parse(document.getElementById("run-list").textContent);
const dialog = document.querySelector("dialog");
const show = (link) => {
  const name = link.closest("table").querySelector("caption").textContent;
  const head = link.closest("table").tHead.rows[0].cells[link.closest("td, th").cellIndex];
  const body = make("tbody");
  let total = 0;
  for (const group of link.dataset.runs.split(" ")) {
    const [size, ...places] = groups[Number(group)];
    total += size;
    for (const place of places) {
      const [id, attempt, seed, round, outcome] = runs[place];
      const path = make("code", {}, `${store}/runs/${id}/${attempt}.json`);
      const texts = [id, `${seed}`, `${round}`, outcome].map((text) => make("td", {}, text));
      body.append(make("tr", {}, ...texts, make("td", {}, path)));
    }
  }
  dialog.querySelector("h2").textContent =
    `${name}, ${head.textContent}: ${link.textContent.trim()}`;
  dialog.querySelector("p").textContent =
    body.rows.length === total ? `From ${total} run${total === 1 ? "" : "s"}.`
      : `From ${total} runs, of which ${body.rows.length} are listed; the CSV names all.`;
  dialog.querySelector("tbody").replaceWith(body);
  dialog.showModal();
};
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-runs]");
  if (!link) return;
  event.preventDefault();
  show(link);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

// Theme: as the system has it, then the other; remembered in this page alone.
const isDark = matchMedia("(prefers-color-scheme: dark)");
const theme = make("button", { type: "button", className: "plain" });
const name = () => (document.documentElement.dataset.theme ?? (isDark.matches ? "dark" : "light"));
const label = () => { theme.textContent = name() === "dark" ? "Light theme" : "Dark theme"; };
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = name() === "dark" ? "light" : "dark";
  label();
});
isDark.addEventListener("change", label);
label();
document.querySelector("header.top").append(theme);

// Paper shows all: where ::details-content is unknown, details are opened to print.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
