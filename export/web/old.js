// Only browsers that know no modules run this.
document.getElementById("loading").hidden = true;
var problem = document.getElementById("problem");
problem.textContent = "This browser is too old for this page: it needs JavaScript modules and WebAssembly.";
problem.hidden = false;
