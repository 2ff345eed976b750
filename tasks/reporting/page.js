"use strict";
(() => {
  const table = document.getElementById("variants");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];

  const value = (row, column) => {
    const given = row.cells[column].dataset.value;
    if (given === undefined) return null;
    return given.trim() === "" || Number.isNaN(Number(given)) ? given : Number(given);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });

  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (x === null || y === null) return (x === null) - (y === null); // what was not measured stays below
        return rising ? compare(x, y) : compare(y, x);
      });
      body.append(...rows);
    });
  });

  const form = document.getElementById("budget");
  if (!form) return;
  const input = form.querySelector("input");
  const output = form.querySelector("output");
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", () => {
    const budget = input.valueAsNumber * 1e6;
    const rows = [...body.rows].filter((row) => row.dataset.cost);
    rows.forEach((row) => row.classList.remove("too-large", "chosen"));
    output.textContent = "";
    if (!(budget > 0)) return;
    const fits = rows.filter((row) => Number(row.dataset.cost) <= budget);
    rows.filter((row) => !fits.includes(row)).forEach((row) => row.classList.add("too-large"));
    fits.sort((a, b) => a.dataset.loss - b.dataset.loss || a.dataset.cost - b.dataset.cost);
    if (fits.length) fits[0].classList.add("chosen");
    output.textContent = fits.length ? `${fits[0].dataset.name} (${fits[0].dataset.words})` : "none fits";
  });
})();
