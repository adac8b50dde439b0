// Sorts a table by the column whose heading is pressed; a button answers Enter and Space itself.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent, number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  const sort = (column) => {
    const heading = headings[column], before = heading.getAttribute("aria-sort");
    // numbers begin with the largest, names with the first
    const first = heading.classList.contains("n") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = before === first ? other : first, sign = order === "ascending" ? 1 : -1;
    const empty = (v) => v === "–"; // no value: last in both orders
    const compare = (a, b) =>
      empty(a) || empty(b) ? empty(a) - empty(b) : sign * (a < b ? -1 : a > b ? 1 : 0);
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    body.append(...rows.sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
    headings.forEach((h) => h.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
  };
  headings.forEach((heading, column) =>
    heading.querySelector("button").addEventListener("click", () => sort(column)));
}
