"use strict";
// Tables of class "sortable": a click on a heading, or Enter or Space, sorts by its column; a second one reverses the order.
// Cells are compared by their first number; cells without a number come last.

{ // in its own block, because a page can have other scripts
  function number(cell) {
    const found = cell.textContent.replace(/,(?=\d{3})/g, "").match(/^\s*[-+]?[\d.]+(e[-+]?\d+)?/i);
    return found ? parseFloat(found[0]) : NaN;
  }

  function compare(a, b, column, sign) {
    const [x, y] = [number(a.cells[column]), number(b.cells[column])];
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
    if (!Number.isNaN(x)) return sign * (x - y);
    return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const sort = (column) => {
      const falling = heads[column].ariaSort === "descending" || (column === 0 && heads[0].ariaSort !== "ascending");
      for (const head of heads) head.ariaSort = null;
      heads[column].ariaSort = falling ? "ascending" : "descending";
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => compare(a, b, column, falling ? 1 : -1)));
    };
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.addEventListener("click", () => sort(column));
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault(); // Space would scroll
        sort(column);
      });
    });
  }
}
