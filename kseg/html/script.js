for (const range of document.querySelectorAll(".stage input")) {
  const divide = () => range.parentElement.style.setProperty("--at", range.value + "%");
  range.addEventListener("input", divide);
  divide();
}
