"use strict";
// Both work on what the page has already: without this script tables keep their order, and titles show on hover.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[index];
        return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
      };
      const isMissing = (row) => row.cells[index].textContent === "–";
      const compare = (a, b) => {
        if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b); // last in both orders
        const [x, y] = [value(a), value(b)];
        const order = typeof x === "number" && typeof y === "number"
          ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
const texts = new Map();
for (const point of document.querySelectorAll(".hit")) {
  const title = point.querySelector("title");
  texts.set(point, title.textContent);
  title.remove(); // or the browser shows it as well
}
document.addEventListener("pointerover", (event) => {
  const point = event.target.closest?.(".hit");
  tip.hidden = !point;
  if (!point) return;
  tip.textContent = texts.get(point);
  const place = point.getBoundingClientRect();
  const left = place.left + place.width / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  const top = place.top - tip.offsetHeight - 8;
  tip.style.top = `${top < 8 ? place.bottom + 8 : top}px`;
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
