"use strict";
/* The page of a scan: all of it stands without this, which makes its tables sort. */

for (const table of document.querySelectorAll("table.sorts")) page.sortable(table);
document.documentElement.dataset.ready = "yes";
