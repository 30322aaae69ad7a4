// Filters of the samples: a caption is shown if it passes all of them, a card if one of its captions does.
(() => {
  "use strict";
  const form = document.querySelector(".filters");
  if (!form) return;
  const cards = [...document.querySelectorAll("article.sample")].map((card) => ({
    card,
    entries: [...card.querySelectorAll(".entry[data-change]")].map((entry) => ({
      entry,
      change: entry.dataset.change,
      row: entry.dataset.row,
      text: entry.querySelector(".caption").textContent.toLowerCase(),
    })),
    about: [...card.querySelectorAll("header, .question, .pair p")].map((part) => part.textContent).join("\n").toLowerCase(),
  }));
  const all = cards.reduce((sum, { entries }) => sum + entries.length, 0);
  const filter = () => {
    const chosen = new FormData(form);
    const change = chosen.get("change");
    const row = chosen.get("row") || "";
    const text = (chosen.get("text") || "").trim().toLowerCase();
    let shown = 0;
    for (const { card, entries, about } of cards) {
      let some = false;
      for (const one of entries) {
        const passes = (!change || one.change === change) && (!row || one.row === row)
          && (!text || one.text.includes(text) || about.includes(text));
        one.entry.hidden = !passes;
        some = some || passes;
        shown += passes;
      }
      card.hidden = !some;
    }
    form.querySelector("output").textContent = `${shown} of ${all} captions`;
    document.querySelector(".none").hidden = shown > 0;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
